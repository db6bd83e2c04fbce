"""Our client beside others, against the same gateway."""
