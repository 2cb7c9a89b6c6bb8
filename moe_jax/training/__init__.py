"""One run: objectives, optimizer, step, hooks, metrics, and the loop around them."""
