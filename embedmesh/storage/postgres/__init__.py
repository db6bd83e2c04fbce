"""A store on a PostgreSQL server, for any number of gateways."""
