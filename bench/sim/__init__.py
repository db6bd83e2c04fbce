"""Our line beside other people's routers, in virtual time."""
