"""A balancer of your own in ten lines, compared with two built-in ones.

python experiments/examples/own_balancer.py
"""

import jax.numpy as jnp

import moe_jax


def centred_bias(rate: float = 0.01) -> moe_jax.Balancer:
  """b += rate * (mean(c) - c) / max(|mean(c) - c|): the worst expert moves by `rate`, the others less."""

  def update(bias_E, counts_E):
    error_E = counts_E.mean() - counts_E
    return bias_E + rate * error_E / jnp.maximum(jnp.abs(error_E).max(), 1)

  count = lambda bias_E, routing: routing.selected_BLE.sum(axis=(0, 1))
  return moe_jax.Balancer(init=jnp.zeros, bias=lambda bias_E: bias_E, observe=count, update=update)


ARMS = {
  "none": {"balancers": "none"},
  "switch_loss": {"balancers": "switch_loss:0.01"},
  "mine": {"balancers": centred_bias},
}

if __name__ == "__main__":
  comparison = moe_jax.Comparison(ARMS, seeds=range(3), config=moe_jax.preset("tiny"), output_dir="runs/mine")
  comparison.report(
    comparison.run(), title="My balancer", question="Does it balance?", command="own_balancer.py"
  )
