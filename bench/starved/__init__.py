"""What a machine that is busy with other things may not do to the engine: see `__main__`."""
