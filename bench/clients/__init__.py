"""Clients of other APIs before our gateway, unmodified."""
