"""Soft MoE (2308.00951): experts work on mixtures of tokens, so nothing is chosen and nothing drops."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config import MoEConfig
from moe_jax.errors import InputError
from moe_jax.nn.methods import check_methods
from moe_jax.nn.mlp import MLP
from moe_jax.nn.variables import BalancerState, matrix, weight
from moe_jax.ops import stats
from moe_jax.ops.balancing import make_balancer
from moe_jax.ops.dispatch.common import run_experts
from moe_jax.ops.experts import ExpertWeights, expert_ffn
from moe_jax.sharding import constrain
from moe_jax.types import Array, MoEAux

EPSILON = 1e-6  # of the squared norm, as in google-research/vmoe


class SoftMoE(nnx.Module):
  """Every slot of an expert takes a mean of the sequence's tokens, and every token a mean of all slots' outputs.

  With C slots per expert (2308.00951, section 2; details as in the code of google-research/vmoe,
  projects/soft_moe/router.py):

    logits_BLEC = scale * <x / |x|, w_slots / |w_slots|>, with a learned scale that starts at 1
    slot        = sum over tokens l of softmax_l(logits) x_l, the softmax over the valid tokens of the sequence
    y           = sum over slots (e, c) of softmax_ec(logits) expert_e(slot_ec)

  The experts' work is E*C rows per sequence whatever its length: choose C so that E*C is near it. Padding enters
  no slot and gets zero. A slot holds later tokens too, so in a causal model the layer leaks.

  Raises:
    InputError: the configuration names a router, balancers, groups or jitter, which this layer has not.
  """

  def __init__(self, config: MoEConfig, dim: int, init_scale: float = 1.0, slots: int = 1, *, rngs: nnx.Rngs):
    check_methods(config)
    if slots < 1:
      raise InputError(f"layer soft_moe: slots must be at least 1, got {slots}")
    e, f = config.num_experts, config.expert_dim
    into, out = ("expert", "embed", "mlp"), ("expert", "mlp", "embed")
    gated = config.expert_activation == "swiglu"
    self.w_slots_DEC = matrix(rngs, (dim, e, slots), ("embed", "router", "capacity"))
    self.scale = nnx.Param(jnp.ones((), jnp.float32), logical_axes=())
    self.w_gate_EDF = matrix(rngs, (e, dim, f), into, init_scale) if gated else None
    self.w_up_EDF = matrix(rngs, (e, dim, f), into, init_scale)
    self.w_down_EFD = matrix(rngs, (e, f, dim), out, init_scale)
    shared = config.num_shared_experts * f
    self.shared = MLP(dim, shared, config.expert_activation, init_scale, rngs=rngs) if shared else None
    self.balancer = config.balancers  # none: only so that the train step finds the state that it expects
    self.balancer_state = BalancerState(make_balancer(self.balancer).init(e))

  def __call__(self, x_BLD: Array, mask_BL: Array | None = None, **unused) -> tuple[Array, MoEAux]:
    """One forward pass.

    Args:
      x_BLD: activations of any float dtype; the softmaxes work in float32 whatever it is.
      mask_BL: bool, False for padding.
      **unused: what `MoE` takes besides; nothing here is drawn, balanced, or different in training.

    Returns:
      y_BLD, and a `MoEAux` without losses whose counts are soft: an expert's tokens are the combine weights that
      tokens give to its slots, so they sum to the number of valid tokens. The dispatch weights would say
      nothing: those of a slot always sum to 1. The entropy is that of a token's combine weights over experts.
    """
    del unused
    if mask_BL is None:
      mask_BL = jnp.ones(x_BLD.shape[:2], bool)
    dispatch_BLEC, combine_BLEC = self._weights(x_BLD, mask_BL)
    cast = lambda w: None if w is None else weight(w, x_BLD.dtype)
    weights = ExpertWeights(cast(self.w_gate_EDF), cast(self.w_up_EDF), cast(self.w_down_EFD))
    valid_BLD = jnp.where(mask_BL[..., None], x_BLD, 0)  # padding may hold anything, also infinity
    rows_BECD = jnp.einsum("BLEC,BLD->BECD", dispatch_BLEC.astype(x_BLD.dtype), valid_BLD)
    rows_BECD = run_experts(lambda rows, matmul: expert_ffn(weights, rows, matmul), rows_BECD, constrain)
    y_BLD = jnp.einsum("BLEC,BECD->BLD", combine_BLEC.astype(x_BLD.dtype), rows_BECD)
    y_BLD = constrain(y_BLD, ("batch", None, None))
    if self.shared is not None:
      y_BLD = y_BLD + self.shared(x_BLD)
    return y_BLD, self._aux(combine_BLEC, mask_BL)

  def _weights(self, x_BLD: Array, mask_BL: Array) -> tuple[Array, Array]:
    """The dispatch and combine weights [B, L, E, C]; both are 0 for padding."""
    mask_BLEC = mask_BL[:, :, None, None]
    x_BLD = jnp.where(mask_BL[..., None], x_BLD, 0).astype(jnp.float32)
    logits_BLEC = self.scale[...] * jnp.einsum(
      "BLD,DEC->BLEC",
      _unit(x_BLD, axis=-1),
      _unit(weight(self.w_slots_DEC), axis=0),
      precision=jax.lax.Precision.HIGHEST,
    )
    # Not -inf: a sequence of nothing but padding would go through NaN.
    over_tokens_BLEC = jnp.where(mask_BLEC, logits_BLEC, jnp.finfo(jnp.float32).min)
    dispatch_BLEC = jax.nn.softmax(over_tokens_BLEC, axis=1)
    combine_BLEC = jax.nn.softmax(logits_BLEC, axis=(2, 3))
    return jnp.where(mask_BLEC, dispatch_BLEC, 0), jnp.where(mask_BLEC, combine_BLEC, 0)

  def _aux(self, combine_BLEC: Array, mask_BL: Array) -> MoEAux:
    combine_BLE = combine_BLEC.sum(axis=-1)
    tokens_per_expert_BE = combine_BLE.sum(axis=1)
    aux = MoEAux(
      losses={},
      balancer_stats=make_balancer(self.balancer).observe(self.balancer_state.get_value(), None),
      tokens_per_expert_BE=tokens_per_expert_BE,
      kept_per_expert_E=tokens_per_expert_BE.sum(axis=0),
      router_entropy=jnp.sum(stats.entropy(combine_BLE)),
      num_tokens=mask_BL.sum().astype(jnp.float32),
    )
    return jax.lax.stop_gradient(aux)


def soft_moe(config: MoEConfig, dim: int, init_scale: float, rngs: nnx.Rngs, slots: int = 1) -> SoftMoE:
  """Soft MoE (2308.00951) with `slots` slots per expert."""
  return SoftMoE(config, dim, init_scale, slots, rngs=rngs)


def _unit(x: Array, axis: int) -> Array:
  return x * jax.lax.rsqrt(jnp.sum(x * x, axis=axis, keepdims=True) + EPSILON)
