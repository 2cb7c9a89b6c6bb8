"""Routers that add to the layer's output themselves: MoE++ (2410.07348), LongCat-Flash and BASE (2103.16716)."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.nn.routers.linear import LinearRouter
from moe_jax.nn.variables import matrix, vector, weight
from moe_jax.ops.routing.base_assignment import base_assignment
from moe_jax.ops.routing.common import Choice, in_groups
from moe_jax.ops.routing.zero_computation import longcat_topk, moe_plus_plus, zero_computation_kinds
from moe_jax.types import Array, RouterContext, Routing


class ZeroComputation(nnx.Module):
  """Sum over z of weight_z times expert z, of the kinds (2410.07348, eq. 3-5):

    zero      0
    copy      x
    constant  a1 x + a2 v with a learned vector v and (a1, a2) = softmax(x W)

  v starts standard normal, as in the released code, which is about the size of a normalised token.
  """

  def __init__(self, kinds: tuple[str, ...], dim: int, *, rngs: nnx.Rngs):
    self.copies = tuple(z for z, kind in enumerate(kinds) if kind == "copy")
    self.constants = tuple(z for z, kind in enumerate(kinds) if kind == "constant")
    num = len(self.constants)
    draw = lambda: jax.random.normal(rngs.params(), (num, dim), jnp.float32)
    self.vector_ZD = vector(draw(), ("zero_computation", "embed")) if num else None
    self.w_mix_DZ2 = matrix(rngs, (dim, num, 2), ("embed", "zero_computation", "mix")) if num else None

  def __call__(self, x_GTD: Array, weight_GTZ: Array) -> Array:
    """Returns y_GTD in the dtype of x_GTD.

    `weight_GTZ` are the weights that the router gives to these experts.
    """
    copy_GT = sum((weight_GTZ[..., z] for z in self.copies), jnp.zeros(x_GTD.shape[:2], weight_GTZ.dtype))
    if not self.constants:
      return copy_GT[..., None].astype(x_GTD.dtype) * x_GTD
    weight_GTZ = jnp.stack([weight_GTZ[..., z] for z in self.constants], axis=-1)
    logits_GTZ2 = jnp.einsum(
      "GTD,DZX->GTZX",
      x_GTD.astype(jnp.float32),
      weight(self.w_mix_DZ2),
      precision=jax.lax.Precision.HIGHEST,
    )
    mix_GTZ2 = jax.nn.softmax(logits_GTZ2, axis=-1)
    of_x_GT = copy_GT + jnp.sum(weight_GTZ * mix_GTZ2[..., 0], axis=-1)
    of_vector_GTZ = (weight_GTZ * mix_GTZ2[..., 1]).astype(x_GTD.dtype)
    constant_GTD = jnp.einsum("GTZ,ZD->GTD", of_vector_GTZ, weight(self.vector_ZD, x_GTD.dtype))
    return of_x_GT[..., None].astype(x_GTD.dtype) * x_GTD + constant_GTD


class _WithZeroComputation(LinearRouter):
  """Top-K of E networks and Z zero-computation experts. The choice returns (routing, weight_TZ)."""

  def __init__(
    self,
    choice: Choice,
    kinds: tuple[str, ...],
    dim: int,
    num_experts: int,
    init_scale: float,
    *,
    rngs: nnx.Rngs,
  ):
    self.num_scored_experts = num_experts + len(kinds)
    super().__init__(choice, dim, self.num_scored_experts, init_scale, rngs=rngs)
    self.zero_computation = ZeroComputation(kinds, dim, rngs=rngs)

  def __call__(self, x_GTD: Array, context: RouterContext) -> Routing:
    routing, weight_GTZ = in_groups(self.choose, self.logits(x_GTD), context=context)
    return routing._replace(direct_TD=self.zero_computation(_seen_by_experts(x_GTD, context), weight_GTZ))

  def from_logits(self, logits_GTE: Array, context: RouterContext) -> Routing:
    return in_groups(self.choose, logits_GTE, context=context)[0]


class MoEPlusPlus(_WithZeroComputation):
  """MoE++ (2410.07348): top-K of E networks and Z zero-computation experts.

  See `moe_jax.ops.routing.zero_computation.moe_plus_plus`.
  """

  def __init__(
    self,
    dim: int,
    num_experts: int,
    num_experts_per_token: int,
    *,
    zeros: int = 1,
    copies: int = 1,
    constants: int = 2,
    normalize: bool = False,
    init_scale: float = 1.0,
    rngs: nnx.Rngs,
  ):
    kinds = zero_computation_kinds(zeros, copies, constants)
    choice = moe_plus_plus(num_experts, num_experts_per_token, zeros, copies, constants, normalize)
    super().__init__(choice, kinds, dim, num_experts, init_scale, rngs=rngs)


class LongCatTopK(_WithZeroComputation):
  """LongCat-Flash (2509.01322): top-K of E networks and Z identity experts.

  See `moe_jax.ops.routing.zero_computation.longcat_topk`.
  """

  def __init__(
    self,
    dim: int,
    num_experts: int,
    num_experts_per_token: int,
    *,
    identities: int = 8,
    scale: float = 6.0,
    init_scale: float = 1.0,
    rngs: nnx.Rngs,
  ):
    choice = longcat_topk(num_experts, num_experts_per_token, identities, scale)
    super().__init__(choice, ("copy",) * identities, dim, num_experts, init_scale, rngs=rngs)


class BaseAssignment(LinearRouter):
  """BASE (2103.16716), see `moe_jax.ops.routing.base_assignment`.

  The published layer is a E(x) + (1 - a) x, without a residual around it. `mix` adds the second term.
  """

  def __init__(
    self,
    dim: int,
    num_experts: int,
    num_experts_per_token: int,
    *,
    mix: bool = False,
    init_scale: float = 1.0,
    rngs: nnx.Rngs,
  ):
    choice = base_assignment(num_experts, num_experts_per_token)
    super().__init__(choice, dim, num_experts, init_scale, rngs=rngs)
    self.mix = mix

  def __call__(self, x_GTD: Array, context: RouterContext) -> Routing:
    routing = super().__call__(x_GTD, context)
    if not self.mix:
      return routing
    x_GTD = _seen_by_experts(x_GTD, context)
    left_GT = jnp.where(context.mask, 1 - routing.assignment.weight_A, 0)  # an entry per token: K = 1
    return routing._replace(direct_TD=left_GT[..., None].astype(x_GTD.dtype) * x_GTD)


def _seen_by_experts(x_GTD: Array, context: RouterContext) -> Array:
  return x_GTD if context.layer_input is None else context.layer_input
