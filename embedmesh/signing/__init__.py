"""Who says what, provably: identities, sessions between gateway and node, signed messages, receipts."""
