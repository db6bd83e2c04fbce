"""Many texts at an embeddings endpoint: cut into requests, of which several are in flight, with arrays as answers."""
