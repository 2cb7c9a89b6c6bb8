"""Balancers on the router logits of a recorded run: what a bias would have done, without training."""
