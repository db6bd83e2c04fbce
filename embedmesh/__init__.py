"""embedmesh: one OpenAI-compatible embeddings endpoint in front of as many embedding nodes as you have."""

__version__ = "0.1.0"
