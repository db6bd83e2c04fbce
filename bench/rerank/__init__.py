"""Our reranker beside other people's."""
