"""What a gateway keeps in memory of the store: keys, prices, rate limits, and how it hears of changes."""
