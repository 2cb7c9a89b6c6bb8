"""Accounting of what a model, a layer or a compiled program costs; nothing here trains."""
