"""A man in the middle between a client and a node, without sockets."""
