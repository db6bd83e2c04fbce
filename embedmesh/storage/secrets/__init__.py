"""What is kept secret: the key hash secret, sealed values, and the form of API keys."""
