"""What a gateway keeps in memory of the store: keys, prices, rate limits, and what tells it of changes."""
