"""LatentMoE: routed experts that work in a narrower space than the model."""

from typing import Any

from flax import nnx

from moe_jax.errors import InputError
from moe_jax.nn.context import Context
from moe_jax.nn.experts import EXPERTS, ExpertNetwork
from moe_jax.nn.moe import MoE, Served
from moe_jax.nn.norm import RMSNorm
from moe_jax.nn.parts import made
from moe_jax.nn.variables import matrix, weight
from moe_jax.registry import Spec
from moe_jax.sharding import constrain
from moe_jax.types import Array, Routing

EPSILON = 1e-6  # of the norm


class LatentMoE(MoE):
  """Routed experts in a latent space: `y = shared(x) + RMSNorm(u) W_up`, with u = sum_e g_e expert_e(x W_down).

  Only the experts and the exchange between devices are narrow. The router and the shared experts read x itself.
  The place of the norm is that of released code. Kimi K3 goes from 7168 to 3584, with 896 experts, K = 16 and two
  shared experts (from its report). A token that no expert keeps gets zero from the routed experts, as in `MoE`.

  Args:
    dim: D, the width of the tokens.
    latent_dim: the width of the rows of experts.
    fields: as in `MoE`.

  Raises:
    InputError: if `latent_dim` is less than 1, or as in `MoE`.
  """

  def __init__(
    self,
    dim: int,
    *,
    latent_dim: int,
    num_experts: int = 8,
    expert_dim: int = 256,
    experts: Spec = "swiglu",
    init_scale: float = 1.0,
    rngs: nnx.Rngs,
    **fields: Any,
  ):
    if latent_dim < 1:
      raise InputError(f"ffn latent_moe: latent_dim must be at least 1, got {latent_dim}")
    common = {"num_experts": num_experts, "expert_dim": expert_dim, "init_scale": init_scale, "rngs": rngs}
    network = made(EXPERTS, experts, ExpertNetwork, dim=latent_dim, **common)
    super().__init__(dim, experts=network, **common, **fields)
    self.w_down_DX = matrix(rngs, (dim, latent_dim), ("embed", "latent"), init_scale)
    self.latent_norm = RMSNorm(latent_dim, EPSILON)
    self.w_up_XD = matrix(rngs, (latent_dim, dim), ("latent", "embed"), init_scale)

  def _experts(self, x_BLD: Array, routing: Routing, context: Context) -> Served:
    latent_BLX = constrain(x_BLD @ weight(self.w_down_DX, x_BLD.dtype), ("batch", None, None))
    served = super()._experts(latent_BLX, routing, context)
    y_BLD = self.latent_norm(served.y_BLD) @ weight(self.w_up_XD, x_BLD.dtype)
    return served._replace(y_BLD=constrain(y_BLD, ("batch", None, None)))
