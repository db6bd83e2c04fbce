"""The engine's speed beside other people's, in one interleaved run: `python -m bench.engine`."""
