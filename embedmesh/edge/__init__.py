"""HTTP only: routes, the failure table, the node client. No rule lives here and no money moves here."""
