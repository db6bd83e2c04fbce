"""The node's process: its API for gateways and callers, joining and dialling, and what builds them."""
