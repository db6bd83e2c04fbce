"""Our scheduler beside other people's routers, in virtual time."""
