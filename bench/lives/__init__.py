"""Thousands of lives of requests, under one scheduler that a seed decides: see `__main__`."""
