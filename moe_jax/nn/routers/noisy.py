"""Routers with learned noise. A second matrix sets its standard deviation (1701.06538)."""

from flax import nnx

from moe_jax.nn.routers.base import project
from moe_jax.nn.routers.linear import LinearRouter
from moe_jax.nn.variables import matrix, weight
from moe_jax.ops.routing import hierarchical, noisy
from moe_jax.ops.routing.common import in_groups
from moe_jax.types import Array, RouterContext, Routing


class NoisyTopK(LinearRouter):
  """Noisy top-k (1701.06538, eq. 3-5), see `moe_jax.ops.routing.noisy.noisy_topk`."""

  def __init__(
    self,
    dim: int,
    num_experts: int,
    num_experts_per_token: int,
    *,
    min_std: float = 0.01,
    init_scale: float = 1.0,
    rngs: nnx.Rngs,
  ):
    choice = noisy.noisy_topk(num_experts, num_experts_per_token, min_std)
    super().__init__(choice, dim, num_experts, init_scale, rngs=rngs)
    self.w_noise_DE = matrix(rngs, (dim, num_experts), ("embed", "router"), zero=True)

  def __call__(self, x_GTD: Array, context: RouterContext) -> Routing:
    noise_GTE = project(x_GTD, weight(self.w_noise_DE))
    return in_groups(self.choose, self.logits(x_GTD), noise_GTE, context=context)

  def from_logits(self, logits_GTE: Array, context: RouterContext) -> None:
    return None


class HierarchicalTopK(LinearRouter):
  """Hierarchical mixture of experts (1701.06538, appendix B), see `moe_jax.ops.routing.hierarchical`."""

  def __init__(
    self,
    dim: int,
    num_experts: int,
    num_experts_per_token: int,
    *,
    groups: int = 4,
    groups_per_token: int = 2,
    noise: str = "learned",
    min_std: float = 0.01,
    init_scale: float = 1.0,
    rngs: nnx.Rngs,
  ):
    choice = hierarchical.hierarchical_topk(
      num_experts, num_experts_per_token, groups, groups_per_token, noise, min_std
    )
    super().__init__(choice, dim, num_experts, init_scale, rngs=rngs)
    further = lambda width: matrix(rngs, (dim, width), ("embed", "router"), init_scale, zero=choice.zero_init)
    self.w_group_DP = further(groups)
    is_noisy = noise == "learned"
    self.w_noise_DE = further(num_experts) if is_noisy else None
    self.w_group_noise_DP = further(groups) if is_noisy else None

  def __call__(self, x_GTD: Array, context: RouterContext) -> Routing:
    further = (self.w_group_DP, self.w_noise_DE, self.w_group_noise_DP)
    others = [project(x_GTD, weight(w)) for w in further if w is not None]
    return in_groups(self.choose, self.logits(x_GTD), *others, context=context)

  def from_logits(self, logits_GTE: Array, context: RouterContext) -> None:
    return None
