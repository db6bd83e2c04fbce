"""What outlives a request: files, and the batches that are worked off from them."""
