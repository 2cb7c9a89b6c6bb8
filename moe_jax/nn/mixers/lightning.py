"""Lightning attention (2401.04658) as MiniMax-01 has it (2501.08313, section 2.2)."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.errors import InputError
from moe_jax.nn.context import Context
from moe_jax.nn.norm import RMSNorm
from moe_jax.nn.variables import matrix, weight
from moe_jax.ops.lightning import decay_rates, linear_attention
from moe_jax.sharding import constrain
from moe_jax.types import Array

_STATE = ("batch", "heads", None, None)


class Lightning(nnx.Module):
  """Linear attention with decay, causal only: `y_BLD, None = lightning(x_BLD, context)`.

  With q, k and v the silu of three projections, y = (norm(o) * sigmoid(x Wg)) Wo, where o_i is the sum over
  j <= i of exp(-rate (i - j)) (q_i . k_j) v_j. There is no softmax, and no scale. The rate follows from the
  head and from the layer (`moe_jax.ops.lightning.decay_rates`), which `context.layer` says. The norm is over
  all heads together.

  Padding follows the text, so nothing real sees it. The cache is the recurrent state, whatever the length.

  Args:
    dim: D.
    num_heads: N.
    head_dim: H.
    causal: must be True.
    num_layers: blocks of the model, of every kind.
    chunk: positions whose products are computed at once.
    out_norm_eps: added to the mean square in the norm.
    init_scale: s in std = sqrt(s / fan_in) of every matrix.
    rngs: draws the parameters.

  Raises:
    InputError: if `causal` is False, or `chunk` is not positive.
  """

  def __init__(
    self,
    dim: int,
    num_heads: int,
    head_dim: int,
    *,
    causal: bool = True,
    num_layers: int = 1,
    chunk: int = 256,
    out_norm_eps: float = 1e-6,
    init_scale: float = 1.0,
    rngs: nnx.Rngs,
  ):
    if not causal:
      raise InputError("mixer lightning: is causal only; a model that sees later tokens needs attention")
    if chunk < 1:
      raise InputError(f"mixer lightning: chunk must be positive, got {chunk}")
    d, n, h, s = dim, num_heads, head_dim, init_scale
    self.num_heads, self.head_dim, self.num_layers, self.chunk = n, h, num_layers, chunk
    project = lambda: matrix(rngs, (d, n, h), ("embed", "heads", "head_dim"), s)
    self.w_query_DNH, self.w_key_DNH, self.w_value_DNH = project(), project(), project()
    self.w_out_gate_DNH = project()
    self.norm = RMSNorm(n * h, out_norm_eps)
    self.w_out_NHD = matrix(rngs, (n, h, d), ("heads", "head_dim", "embed"), s, num_in=2)

  def __call__(self, x_BLD: Array, context: Context) -> tuple[Array, None]:
    if context.segment_BL is not None:
      raise InputError(
        "mixer lightning: its state goes on from text to text of a packed row; use --pack_examples=false"
      )
    return self._mixed(x_BLD, context.layer, None, None)[0], None

  def init_cache(self, batch_size: int, length: int, dtype: jnp.dtype) -> Array:
    """Returns an empty state, float32 [B, N, H, H]. It does not depend on `length` and `dtype`."""
    empty = jnp.zeros((batch_size, self.num_heads, self.head_dim, self.head_dim), jnp.float32)
    return constrain(empty, _STATE)

  def extend(self, x_BLD: Array, context: Context, cache: Array) -> tuple[Array, Array]:
    """Returns (y_BLD, state) for tokens behind those of the state, see `moe_jax.nn.mixers`."""
    return self._mixed(x_BLD, context.layer, cache, context.past.mask(x_BLD.shape[1]))

  def _mixed(
    self, x_BLD: Array, layer: Array | int, state_BNHH: Array | None, mask_BL: Array | None
  ) -> tuple[Array, Array]:
    dtype = x_BLD.dtype
    project = lambda w: jnp.einsum("BLD,DNH->BLNH", x_BLD, weight(w, dtype))
    query, key, value = (
      jax.nn.silu(project(w)) for w in (self.w_query_DNH, self.w_key_DNH, self.w_value_DNH)
    )
    if mask_BL is not None:  # padding comes first, where the state is zero, and adds nothing to it
      key *= mask_BL[:, :, None, None].astype(dtype)
    rate_N = decay_rates(self.num_heads, layer, self.num_layers)
    mixed, state_BNHH = linear_attention(query, key, value, rate_N, state_BNHH, chunk=self.chunk)
    normed = self.norm(mixed.reshape(*mixed.shape[:2], -1)).reshape(mixed.shape)
    gated = normed * jax.nn.sigmoid(project(self.w_out_gate_DNH))
    y_BLD = jnp.einsum("BLNH,NHD->BLD", gated, weight(self.w_out_NHD, dtype))
    return y_BLD, constrain(state_BNHH, _STATE)
