"""Proof of who sent what: identities, sessions between gateway and node, signed messages, receipts."""
