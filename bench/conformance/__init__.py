"""What becomes of a caller when nodes are wrong, behind us and behind other gateways: `make conformance`."""
