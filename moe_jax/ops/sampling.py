"""Chooses the next token of each sequence from its logits."""

import jax
import jax.numpy as jnp

from moe_jax.types import Array


def next_token(
  logits_BV: Array,
  key_B: Array,
  temperature: Array | None,
  top_k: int = 0,
  top_p: Array | None = None,
) -> Array:
  """Returns a token id for each sequence, int32 [B].

  Args:
    logits_BV: float32.
    key_B: a random key for each sequence, so that a draw does not depend on the rest of the batch.
    temperature: a scalar that logits are divided by, not below the smallest normal float32, for less may count as 0;
      None: the most likely token, whatever the rest.
    top_k: draw from the k most likely tokens; 0: from all.
    top_p: a scalar: draw from the fewest tokens whose probabilities add up to it (nucleus sampling,
      1904.09751, section 3.1), after `top_k`; None: from all.
  """
  if temperature is None:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  # The largest becomes 0, so that the smallest temperature leaves it finite, and others no larger.
  logits_BV = (logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)) / temperature
  if 0 < top_k < logits_BV.shape[-1]:
    least_B1 = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
    logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
  if top_p is not None:
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
    is_kept_BV = (before_BV < top_p).at[:, 0].set(True)
    least_B1 = jnp.min(jnp.where(is_kept_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
    logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
  return jax.vmap(jax.random.categorical)(key_B, logits_BV).astype(jnp.int32)
