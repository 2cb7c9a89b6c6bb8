"""Slow, plain references that the tests compare with."""
