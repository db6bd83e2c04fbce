"""The OpenAI form of an embeddings request, with the fields that clients of other APIs add."""
