"""Expert dropout: Switch's regularisation for fine-tuning (2101.03961, section 2.4)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.errors import InputError
from moe_jax.nn.experts.base import ExpertNetwork, WrappingNetwork, inner_experts
from moe_jax.ops.experts import Activation, Product, Wrapper
from moe_jax.registry import Spec
from moe_jax.types import Array


class ExpertDropout(WrappingNetwork):
  """The network `experts` with dropout: in training, hidden units are set to 0 with probability `rate`.

  The other units are divided by 1 - rate. Switch uses 0.4 inside experts and 0.1 elsewhere. Which units of a
  row drop depends on the keys of the step and of the token's sequence, the token's position, and the expert.
  The draw is therefore the same under any dispatcher, on any mesh, and in any micro-batch.

  Raises:
    InputError: if `rate` is not in [0, 1).
  """

  def __init__(
    self,
    num_experts: int,
    dim: int,
    expert_dim: int,
    *,
    rate: float = 0.4,
    experts: Spec = "swiglu",
    init_scale: float = 1.0,
    rngs: nnx.Rngs,
  ):
    if not 0 <= rate < 1:
      raise InputError(f"experts expert_dropout: rate must be in [0, 1), got {rate}")
    self.rate, self.shape = rate, (num_experts, expert_dim)
    self.experts = inner_experts(experts, num_experts, dim, expert_dim, init_scale=init_scale, rngs=rngs)
    self.salt_EF = nnx.data(None)

  def for_step(self, key: Array | None) -> ExpertNetwork:
    if key is None or self.rate == 0:
      return super().for_step(key)
    drawn = nnx.clone(super().for_step(jax.random.fold_in(key, 1)))
    drawn.draws = True
    drawn.salt_EF = nnx.Variable(jax.random.bits(key, self.shape, jnp.uint32), logical_axes=("expert", "mlp"))
    return drawn

  def __call__(self, rows: Array, product: Product) -> Array:
    if self.salt_EF is None:
      return self.experts(rows, product)
    return self.experts(rows, _Dropping(product, self.salt_EF[...], self.rate))


class _Dropping(Wrapper):
  """A product whose hidden units drop out."""

  def __init__(self, product: Product, salt_EF: Array, rate: float):
    super().__init__(product)
    self._salt_EF, self._rate = salt_EF, rate

  def hidden(self, rows: Array) -> Array:
    bits = _mix(self.row_bits[..., None] ^ self.per_row(self._salt_EF))
    kept = bits >= jnp.uint32(round(self._rate * 2**32))
    return jnp.where(kept, rows / (1 - self._rate), 0).astype(rows.dtype)

  def ffn(self, activation: Activation, rows: Array, w_in: Sequence[Array], w_out_EFD: Array) -> Array:
    return self(self.hidden(activation(*(self(rows, w) for w in w_in))), w_out_EFD)


def _mix(bits: Array) -> Array:
  """A hash of 32 bits in which every output bit depends on every input bit (the finaliser of MurmurHash3)."""
  bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
  bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
  return bits ^ (bits >> 16)
