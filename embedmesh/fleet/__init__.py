"""Which nodes there are, how they are, and which to ask."""
