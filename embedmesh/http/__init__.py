"""What both processes use to speak HTTP: the server, its fast path, bodies, failures and the reply's bytes."""
