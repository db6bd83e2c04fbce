"""What is fetched or made before a first start: assets, wheels, models, the bootstrap key."""
