"""Expert-router coupling: a loss that makes each row of the router resemble the tokens that its expert responds to."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.errors import InputError
from moe_jax.nn.context import DEFAULT, Context
from moe_jax.nn.moe import MoE
from moe_jax.nn.variables import weight as gathered_weight
from moe_jax.types import Array, MoEAux


class CoupledMoE(MoE):
  """Routed experts with the ERC loss (2512.23447; from memory, the paper was not re-read).

  With r_i the column of the router's matrix for expert i, perturbed, and M_ij = |r_i W_j|, the norm of what the
  gate matrix W_j of expert j makes of it, the loss is

    weight / E^2 * sum_i sum_{j != i} relu(M_ij - alpha M_ii) + relu(M_ji - alpha M_ii)

  so expert i responds to its own column more than to the others, and more than the others do. It does not depend
  on tokens. In training, an element of r_i is multiplied by U(1 - eps_i, 1 + eps_i), with eps_i half of the
  distance from r_i to the nearest other column, divided by |r_i|. The draw is the same in all micro-batches.

  Experts with one matrix before the activation use that one. The norm is that of the product, before the
  activation (from memory as well).

  Args:
    dim: D.
    weight: the weight of the loss.
    alpha: the margin; a smaller one asks for more specialised experts.
    fields: as in `MoE`.

  Raises:
    InputError: if an option is out of range, the router is not one matrix, or the network of experts has no
      matrix of its own.
  """

  def __init__(self, dim: int, *, weight: float = 1.0, alpha: float = 1.0, rngs: nnx.Rngs, **fields: Any):
    for name, value in (("weight", weight), ("alpha", alpha)):
      if not value >= 0:
        raise InputError(f"ffn erc_moe: {name} must be 0 or more, got {value}")
    super().__init__(dim, rngs=rngs, **fields)
    self.loss_weight, self.alpha = weight, alpha
    if not hasattr(self.router, "w_router_DE"):
      raise InputError("ffn erc_moe: the router has no matrix with a column per expert; use a linear one")
    if self._matrix() is None:
      raise InputError(
        "ffn erc_moe: the network of experts has no w_gate_EDF or w_up_EDF of its own; use one such as swiglu"
      )

  def __call__(self, x_BLD: Array, context: Context = DEFAULT) -> tuple[Array, MoEAux]:
    y_BLD, aux = super().__call__(x_BLD, context)
    key = context.drawing_key
    router_DE = gathered_weight(self.router.w_router_DE)[:, : self.num_experts]
    loss = erc_loss(router_DE, gathered_weight(self._matrix()), self.alpha, key)
    return y_BLD, aux._replace(losses=aux.losses | {"erc_loss": self.loss_weight * loss})

  def _matrix(self) -> nnx.Param | None:
    return getattr(self.experts, "w_gate_EDF", None) or getattr(self.experts, "w_up_EDF", None)


def erc_loss(router_DE: Array, w_EDF: Array, alpha: float, key: Array | None) -> Array:
  """Returns the loss of `CoupledMoE` with weight 1. Without a key, columns are not perturbed."""
  num_experts = w_EDF.shape[0]
  column_ED = router_DE.T
  if key is not None:
    draw_ED = jax.random.uniform(jax.random.fold_in(key, 1), column_ED.shape, jnp.float32, minval=-1.0)
    column_ED = column_ED * (1 + _radius(column_ED)[:, None] * draw_ED)
  norm_EX = _norm(jnp.einsum("ED,XDF->EXF", column_ED, w_EDF, precision=jax.lax.Precision.HIGHEST))
  own_E1 = alpha * jnp.diagonal(norm_EX)[:, None]
  excess_EX = jax.nn.relu(norm_EX - own_E1) + jax.nn.relu(norm_EX.T - own_E1)
  return jnp.sum(jnp.where(jnp.eye(num_experts, dtype=bool), 0, excess_EX)) / num_experts**2


def _radius(column_ED: Array) -> Array:
  """Half of the distance from each column to the nearest other one, divided by the norm of the column; no gradient."""
  column_ED = jax.lax.stop_gradient(column_ED)
  distance_EX = _norm(column_ED[:, None] - column_ED[None])
  nearest_E = jnp.where(jnp.eye(len(column_ED), dtype=bool), jnp.inf, distance_EX).min(axis=-1)
  norm_E = _norm(column_ED)
  return jnp.where(
    (norm_E > 0) & jnp.isfinite(nearest_E), nearest_E / (2 * jnp.where(norm_E > 0, norm_E, 1)), 0
  )


def _norm(x: Array) -> Array:
  """The norm over the last axis, whose gradient at 0 is 0."""
  square = jnp.sum(x * x, axis=-1)
  return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
