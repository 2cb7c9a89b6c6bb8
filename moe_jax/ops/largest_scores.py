"""The largest attention score of each head, without storing all scores."""

import jax
import jax.numpy as jnp

from moe_jax.ops.attention import BLOCK
from moe_jax.types import Array


def largest_scores(
  query_BLNH: Array,
  key_BLNH: Array,
  mask_BL: Array,
  *,
  causal: bool = True,
  window: int = 0,
  scale: float | None = None,
  segment_BL: Array | None = None,
  block: int = BLOCK,
) -> Array:
  """Returns the largest scale * q . k of each query head, float32 [N], without a gradient.

  It is over all positions that the mask has, and those they attend to; -inf if there are none. A sink takes no
  part.

  Args:
    query_BLNH: queries of any float type.
    key_BLNH: keys. Their number of heads divides that of the queries.
    mask_BL: bool, False: padding.
    causal, window, scale, segment_BL, block: as in `moe_jax.ops.attention.attend`.
  """
  query_BLNH, key_BLNH = jax.lax.stop_gradient((query_BLNH, key_BLNH))
  batch, length, num_heads, head_dim = query_BLNH.shape
  # r: the query heads of a key head
  grouped = query_BLNH.reshape(batch, length, key_BLNH.shape[2], -1, head_dim)
  largest = []
  for start in range(0, length, block):
    end = min(start + block, length)
    first = max(0, start - window + 1) if window else 0
    last = end if causal else min(length, end + window - 1) if window else length
    args = grouped[:, start:end], key_BLNH[:, first:last]
    scores = jnp.einsum("BXNrH,BYNH->BNrXY", *args, preferred_element_type=jnp.float32)
    behind_XY = jnp.arange(start, end)[:, None] - jnp.arange(first, last)[None]
    seen_XY = behind_XY >= 0 if causal else jnp.ones(behind_XY.shape, bool)
    if window:
      seen_XY &= jnp.abs(behind_XY) < window
    seen_BXY = seen_XY[None] & mask_BL[:, start:end, None] & mask_BL[:, None, first:last]
    if segment_BL is not None:
      seen_BXY &= segment_BL[:, start:end, None] == segment_BL[:, None, first:last]
    scores = jnp.where(seen_BXY[:, None, None], scores, -jnp.inf)
    largest.append(scores.max(axis=(0, 3, 4)).reshape(num_heads))
  return jnp.stack(largest).max(axis=0) * (head_dim**-0.5 if scale is None else scale)
