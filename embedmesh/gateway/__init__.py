"""The gateway's process: its API for callers and operators, its links to nodes, and what builds them."""
