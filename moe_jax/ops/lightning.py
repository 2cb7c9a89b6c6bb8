"""Lightning attention (2401.04658): linear attention that forgets, in chunks and with a recurrent state."""

import jax
import jax.numpy as jnp

from moe_jax.types import Array


def decay_rates(num_heads: int, layer: Array | int, num_layers: int) -> Array:
  """Returns the rate of each head: it forgets by exp(-rate) per position, float32 [N].

  rate = 2^(-8 (h + 1) / N) * (1 - l / (L - 1 + 1e-5) + 1e-5) for head h of N and layer l of L, as in
  transformers' code of MiniMax-01 (2501.08313). Where N is no power of two, public copies of its released code
  (`MiniMaxText01LinearAttention`) have other rates: they interpolate those of powers of two, as ALiBi does
  (2108.12409). Later layers forget more slowly. A module of multi-token prediction is behind the last layer, where the
  formula would be negative, and has the rates of the last layer.
  """
  head_N = jnp.arange(1, num_heads + 1, dtype=jnp.float32)
  # The quotient is (L - 1 - l + 1e-5) / (L - 1 + 1e-5): in the last layers 1 - l / ... would cancel in float32.
  left = jnp.maximum(jnp.asarray(num_layers - 1 - layer, jnp.float32), 0) + 1e-5
  return 2.0 ** (-8.0 * head_N / num_heads) * (left / (num_layers - 1 + 1e-5) + 1e-5)


def linear_attention(
  query_BLNH: Array,
  key_BLNH: Array,
  value_BLNH: Array,
  rate_N: Array,
  state_BNHH: Array | None = None,
  *,
  chunk: int = 256,
) -> tuple[Array, Array]:
  """Returns y_i = sum over j <= i of exp(-rate (i - j)) (q_i . k_j) v_j, and the state behind the last position.

  The state is the sum over j of exp(-rate (i - j)) k_j v_j^T at the last position i. Within a chunk the sum is
  computed as it stands, and what was before the chunk comes from the state (2401.04658, algorithm 1), so the
  cost is linear in L.

  Args:
    query_BLNH, key_BLNH, value_BLNH: of any float dtype. Products add up in float32.
    rate_N: float32, the rates of decay, 0 or more.
    state_BNHH: float32, the state before the first position, [B, N, H of keys, H of values]; None: zero.
    chunk: positions whose products are computed at once.

  Returns:
    (y_BLNH in the dtype of the values, the state in float32).
  """
  batch, length, num_heads, head_dim = key_BLNH.shape
  if state_BNHH is None:
    state_BNHH = jnp.zeros((batch, num_heads, head_dim, value_BLNH.shape[-1]), jnp.float32)
  arrays = (query_BLNH, key_BLNH, value_BLNH)
  whole = length // chunk * chunk
  rows = []
  if whole > chunk:
    cut = lambda x: jnp.moveaxis(x[:, :whole].reshape(batch, -1, chunk, *x.shape[2:]), 1, 0)
    body = jax.checkpoint(lambda state, xs: _one_chunk(state, xs, rate_N), prevent_cse=False)
    state_BNHH, y = jax.lax.scan(body, state_BNHH, tuple(map(cut, arrays)))
    rows.append(jnp.moveaxis(y, 0, 1).reshape(batch, whole, *y.shape[3:]))
  elif whole:
    state_BNHH, y = _one_chunk(state_BNHH, tuple(x[:, :whole] for x in arrays), rate_N)
    rows.append(y)
  if length > whole:  # the last chunk is shorter
    state_BNHH, y = _one_chunk(state_BNHH, tuple(x[:, whole:] for x in arrays), rate_N)
    rows.append(y)
  return (rows[0] if len(rows) == 1 else jnp.concatenate(rows, axis=1)), state_BNHH


def _one_chunk(state_BNHH: Array, arrays: tuple[Array, Array, Array], rate_N: Array) -> tuple[Array, Array]:
  """(the state behind a chunk, y of its positions). No exponent is above 0, so nothing overflows."""
  query_BXNH, key_BXNH, value_BXNH = arrays
  length, dtype = key_BXNH.shape[1], value_BXNH.dtype
  einsum = lambda spec, *xs: jnp.einsum(spec, *xs, preferred_element_type=jnp.float32)
  position_X = jnp.arange(length, dtype=jnp.float32)
  decay = lambda distance: jnp.exp(-rate_N.reshape(-1, *[1] * distance.ndim) * distance[None])
  behind_XY = position_X[:, None] - position_X[None, :]
  kept_NXY = jnp.where(behind_XY[None] >= 0, decay(jnp.maximum(behind_XY, 0)), 0)
  scores_BNXY = einsum("BXNH,BYNH->BNXY", query_BXNH, key_BXNH) * kept_NXY[None]
  within = einsum("BNXY,BYNH->BXNH", scores_BNXY.astype(dtype), value_BXNH)
  # The state has the axes of keys (H) and of values (h).
  before = einsum("BXNH,BNHh->BXNh", query_BXNH.astype(jnp.float32), state_BNHH)
  y_BXNH = within + before * decay(position_X + 1).T[None, :, :, None]
  aged = key_BXNH.astype(jnp.float32) * decay(length - 1 - position_X).T[None, :, :, None]
  added = einsum("BXNH,BXNh->BNHh", aged, value_BXNH.astype(jnp.float32))
  state_BNHH = state_BNHH * jnp.exp(-rate_N * length)[None, :, None, None] + added
  return state_BNHH, y_BXNH.astype(dtype)
