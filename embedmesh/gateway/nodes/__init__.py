"""How a gateway speaks to nodes: own and foreign protocols, coalescing, the roster, registration."""
