"""Holds, transfers and entries: what is written, in which batches, and the proofs over it."""
