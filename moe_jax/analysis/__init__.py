"""Computes the cost of a model, a layer or a compiled program. Nothing here trains."""
