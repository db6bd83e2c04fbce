"""What the gateway adds to streams of chats, beside other gateways: `make bench-generation`."""
