"""Several arms over several seeds: what is run, and what may be concluded."""
