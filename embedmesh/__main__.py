"""`python -m embedmesh`."""

from embedmesh.cli import main

main()
