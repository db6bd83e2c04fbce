"""A real gateway before nodes that misbehave, under load: `python -m bench.fault [--only MODE,...] [--quick] [--json]`.

`load` sends requests and checks every vector, `cells` is what is done with one bad node, `extras` what
is done with whole nodes, `figures` what was found and what it should have been. `pair` compares our own two tiers.
"""
