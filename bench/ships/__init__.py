"""What ships beside the package, built, rendered and started: image, chart, units, proxies."""
