"""Low-rank adapters on frozen experts (LoRA, 2106.09685)."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.errors import InputError
from moe_jax.nn.experts.base import ExpertNetwork, inner_experts
from moe_jax.nn.variables import freeze, matrix
from moe_jax.ops.experts import Product
from moe_jax.registry import Spec
from moe_jax.types import Array


class LowRankExperts(ExpertNetwork):
  """The network `experts`, frozen, with a trained addition to every matrix W: W + alpha / rank * A B.

  A starts random and B at zero, so the layer starts equal to the frozen experts (2106.09685, section 4.1).
  The sum is computed for each expert in every forward pass, which works for any network and costs `rank`
  products per weight.

  Raises:
    InputError: if `rank` is less than 1, or `experts` has no matrices of its own.
  """

  def __init__(
    self,
    num_experts: int,
    dim: int,
    expert_dim: int,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    experts: Spec = "swiglu",
    init_scale: float = 1.0,
    rngs: nnx.Rngs,
  ):
    if rank < 1:
      raise InputError(f"experts low_rank: rank must be at least 1, got {rank}")
    self.scale = alpha / rank
    sizes = (num_experts, dim, expert_dim)
    self.experts = freeze(inner_experts(experts, *sizes, init_scale=init_scale, rngs=rngs))
    down, up = {}, {}
    for name, w in vars(self.experts).items():
      if isinstance(w, nnx.Param) and w.get_value().ndim == 3:
        _, rows, columns = w.get_value().shape
        _, of_rows, of_columns = w.get_metadata()["logical_axes"]
        down[name] = matrix(rngs, (num_experts, rows, rank), ("expert", of_rows, "rank"))
        up[name] = matrix(rngs, (num_experts, rank, columns), ("expert", "rank", of_columns), zero=True)
    if not down:
      raise InputError(
        f"experts low_rank: experts={experts} has no matrices of its own; adapters go inside, e.g. "
        "expert_dropout:experts=low_rank"
      )
    self.down, self.up = nnx.Dict(down), nnx.Dict(up)

  def __call__(self, rows: Array, product: Product) -> Array:
    graphdef, state = nnx.split(self.experts)
    adapted = nnx.merge(graphdef, jax.lax.stop_gradient(state))
    for name in self.down:
      w, addition = (
        getattr(adapted, name),
        jnp.einsum("EXr,ErY->EXY", self.down[name][...], self.up[name][...]),
      )
      w.set_value(w[...] + self.scale * addition)
    return adapted(rows, product)
