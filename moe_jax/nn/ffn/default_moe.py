"""Default MoE: where a token does not reach an expert, the expert's mean output stands for it."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.errors import InputError
from moe_jax.nn.context import Context
from moe_jax.nn.moe import MoE, Served
from moe_jax.ops.balancing import Balancer, balancer_of
from moe_jax.ops.experts import Experts
from moe_jax.ops.routing import selected_experts
from moe_jax.registry import Method, Spec
from moe_jax.types import Array, Assignment, BatchRouting, ExpertOutputs, PyTree, Routing, StepStats


class DefaultMoE(MoE):
  """Default MoE (2504.12463, from the paper): every score of the router has a gradient, at the cost of top-k.

    y = sum_e s_e expert_e(x)  over the experts that serve the token
      + sum_e s_e m_e          over all others, with m_e an average of the outputs of expert e

  After each optimizer step, m_e <- beta * m_e + (1 - beta) * (mean output of e over the tokens of the whole
  step). m starts at zero, has no gradient, and stays where e had no token. It is used in evaluation, too. An
  expert that is chosen but full counts as one that does not serve the token.

  The weights of the experts that do serve are those of the router. Use a router whose weights are its scores,
  such as `softmax_topk:softmax=before`; the paper's is that one.

  Our choices: m holds the means of earlier steps only. With those of the current batch, a token would depend on
  later ones. Beta 0.95 was seen in an implementation by others; the paper's value was not read.

  Args:
    dim: D.
    beta: how much of an average stays, in [0, 1).
    balancer: as in `MoE`. `balancer_state` holds its state, and the averages.
    fields: as in `MoE`.

  Raises:
    InputError: if `beta` is out of range, or as in `MoE`.
  """

  def __init__(
    self,
    dim: int,
    *,
    beta: float = 0.95,
    num_experts: int = 8,
    balancer: Spec | Balancer | tuple[Method, ...] = "none",
    rngs: nnx.Rngs,
    **fields: Any,
  ):
    if not 0 <= beta < 1:
      raise InputError(f"ffn default_moe: beta must be in [0, 1), got {beta}")
    averaging = with_average_outputs(balancer_of(balancer), num_experts, dim, beta)
    super().__init__(dim, num_experts=num_experts, balancer=averaging, rngs=rngs, **fields)
    if self.router.weighs != "output":
      raise InputError("ffn default_moe: weighs what experts return, and this router weighs what they read")

  def _experts(self, x_BLD: Array, routing: Routing, context: Context) -> Served:
    served = super()._experts(x_BLD, routing, context)
    kept = routing._replace(assignment=routing.assignment._replace(valid_A=served.kept_GA))
    is_left_GTE = (jax.vmap(selected_experts)(kept) == 0) & routing.mask_T[..., None]
    # Padding may hold any score.
    score_GTE = jnp.where(is_left_GTE, jnp.exp(jnp.where(is_left_GTE, routing.log_scores_TE, 0)), 0)
    average_ED = jax.lax.stop_gradient(self.balancer_state.get_value()["average_ED"])
    default_GTD = jnp.einsum("GTE,ED->GTD", score_GTE[..., : self.num_experts], average_ED)
    return served._replace(y_BLD=served.y_BLD + default_GTD.reshape(x_BLD.shape).astype(x_BLD.dtype))

  def _dispatch(
    self, rows_GTD: Array, assignment: Assignment, experts: Experts, capacity: int, dim: int
  ) -> tuple[Array, Array, ExpertOutputs]:
    """As in `MoE`, with an own row for every entry, which shows the output of one expert for one token."""
    rows_GAD = jnp.take_along_axis(rows_GTD, assignment.token_A[..., None], axis=1)
    entry_GA = jnp.broadcast_to(jnp.arange(rows_GAD.shape[1], dtype=jnp.int32), assignment.token_A.shape)
    alone = assignment._replace(token_A=entry_GA, weight_A=jnp.ones_like(assignment.weight_A))
    out_GAD, kept_GA, _ = super()._dispatch(rows_GAD, alone, experts, capacity, dim)
    combine = lambda token_A, rows_AD: jnp.zeros(rows_GTD.shape[1:], rows_AD.dtype).at[token_A].add(rows_AD)
    weight_GA = jnp.where(kept_GA, assignment.weight_A, 0)
    y_GTD = jax.vmap(combine)(assignment.token_A, out_GAD * weight_GA[..., None].astype(out_GAD.dtype))
    expert_GAE = jax.nn.one_hot(assignment.expert_A, self.num_experts) * kept_GA[..., None]
    sum_ED = jnp.einsum("GAE,GAD->ED", expert_GAE, out_GAD[..., :dim].astype(jnp.float32))
    return y_GTD, kept_GA, jax.lax.stop_gradient(ExpertOutputs(sum_ED, expert_GAE.sum(axis=(0, 1))))


def with_average_outputs(balancer: Balancer, num_experts: int, dim: int, beta: float) -> Balancer:
  """Returns `balancer`, whose state and statistics also hold what the average output of each expert needs."""

  def init(num_scored_experts: int) -> PyTree:
    average_ED = jnp.zeros((num_experts, dim), jnp.float32)
    return {"balancer": balancer.init(num_scored_experts), "average_ED": average_ED}

  def losses(state: PyTree, routing: BatchRouting, step_stats: StepStats) -> dict[str, Array]:
    return balancer.losses(state["balancer"], routing, StepStats(*(s["balancer"] for s in step_stats)))

  def observe(state: PyTree, routing: BatchRouting) -> PyTree:
    return {"balancer": balancer.observe(state["balancer"], routing), "outputs": routing.outputs}

  def update(state: PyTree, of_step: PyTree) -> PyTree:
    sum_ED, tokens_E = of_step["outputs"]
    tokens_E1 = tokens_E[:, None]
    new_ED = beta * state["average_ED"] + (1 - beta) * sum_ED / jnp.maximum(tokens_E1, 1)
    average_ED = jnp.where(tokens_E1 > 0, new_ED, state["average_ED"])
    return {"balancer": balancer.update(state["balancer"], of_step["balancer"]), "average_ED": average_ED}

  bias = lambda state: balancer.bias(state["balancer"])
  return balancer._replace(init=init, bias=bias, losses=losses, observe=observe, update=update)
