"""The steps before a first start: fetching assets, wheels and models, and making the bootstrap keys."""
