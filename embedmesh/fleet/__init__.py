"""The nodes of a gateway: their states, their load, their health, and which of them gets a request."""
