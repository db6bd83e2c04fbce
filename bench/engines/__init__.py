"""Engines of others, Daft and Ray, before our gateway: how busy they keep a node, and what kills cost."""
