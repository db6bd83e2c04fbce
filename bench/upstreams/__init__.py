"""Real servers of other makes behind our gateway: `make upstreams`."""
