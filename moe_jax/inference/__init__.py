"""Reads text with a model: generates what follows, and measures how likely it is."""
