"""How our gateway chooses among real nodes, beside other routers in front of the same ones: `make bench-fleet`."""
