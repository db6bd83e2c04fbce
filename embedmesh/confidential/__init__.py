"""Sealed requests and replies, key documents, statements: pure, used by node and client; the gateway checks only."""
