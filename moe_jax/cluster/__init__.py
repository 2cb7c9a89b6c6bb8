"""Several processes: how they start, share work, and end together."""
