"""Low-rank adapters on frozen experts (LoRA, 2106.09685)."""

from flax import nnx

from moe_jax.nn.experts.base import WrappingNetwork, inner_experts
from moe_jax.nn.low_rank import Adapters
from moe_jax.ops.experts import Product
from moe_jax.registry import Spec, as_inner
from moe_jax.types import Array


class LowRankExperts(WrappingNetwork):
  """The network `experts`, frozen, with a trained addition to the matrices of every expert: see `Adapters`.

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
    self.experts = inner_experts(experts, num_experts, dim, expert_dim, init_scale=init_scale, rngs=rngs)
    self.adapters = Adapters(
      self.experts, rank, alpha, f"experts low_rank:experts={as_inner(experts)}", rngs=rngs
    )

  def __call__(self, rows: Array, product: Product) -> Array:
    return self.adapters.apply(self.experts, lambda experts: experts(rows, product))
