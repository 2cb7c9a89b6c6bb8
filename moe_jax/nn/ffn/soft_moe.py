"""Soft MoE (2308.00951): experts process mixtures of tokens. Nothing is chosen and nothing drops."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.errors import InputError
from moe_jax.nn.context import DEFAULT, Context
from moe_jax.nn.experts import EXPERTS, ExpertNetwork, as_experts
from moe_jax.nn.parts import made
from moe_jax.nn.variables import matrix, weight
from moe_jax.ops.dispatch.common import run_experts
from moe_jax.ops.experts import with_row_bits
from moe_jax.ops.metrics import LayerRecord, observe
from moe_jax.registry import Spec
from moe_jax.sharding import constrain
from moe_jax.types import Array, MoEAux

EPSILON = 1e-6  # of the squared norm, as in google-research/vmoe


class SoftMoE(nnx.Module):
  """Soft MoE: a slot of an expert is a mean of the sequence's tokens, and an output a mean of all slots.

  With C slots per expert (2308.00951, section 2; details as in the code of google-research/vmoe,
  projects/soft_moe/router.py):

    logits_BLEC = scale * <x / |x|, w_slots / |w_slots|>, with a learned scale that starts at 1
    slot        = sum over tokens l of softmax_l(logits) x_l, the softmax over the valid tokens of the sequence
    y           = sum over slots (e, c) of softmax_ec(logits) expert_e(slot_ec)

  The experts process E*C rows per sequence, whatever its length. Choose C so that E*C is near the length.
  Padding enters no slot, and its output is zero. A slot depends on all tokens of the sequence, so the layer
  leaks in a causal model.

  Args:
    dim: D.
    num_experts: E.
    expert_dim: F.
    slots: C, the slots of each expert.
    experts: the network of the experts: a name, a function or class that makes one, or the module.
    shared: a module that all tokens go through beside the slots, or None.
    init_scale: s in std = sqrt(s / fan_in) of the experts' matrices.
    rngs: draws the parameters.

  Raises:
    InputError: if there is less than one slot.
  """

  leaks = "always"

  def __init__(
    self,
    dim: int,
    num_experts: int,
    expert_dim: int,
    *,
    slots: int = 1,
    experts: Spec | ExpertNetwork = "swiglu",
    shared: nnx.Module | None = None,
    init_scale: float = 1.0,
    rngs: nnx.Rngs,
  ):
    if slots < 1:
      raise InputError(f"ffn soft_moe: slots must be at least 1, got {slots}")
    self.w_slots_DEC = matrix(rngs, (dim, num_experts, slots), ("embed", "router", "capacity"))
    self.scale = nnx.Param(jnp.ones((), jnp.float32), logical_axes=())
    sizes = {"num_experts": num_experts, "dim": dim, "expert_dim": expert_dim}
    self.experts = made(EXPERTS, experts, ExpertNetwork, **sizes, init_scale=init_scale, rngs=rngs)
    self.shared = nnx.data(shared)  # may come later, and is data even while there is none

  def __call__(self, x_BLD: Array, context: Context = DEFAULT) -> tuple[Array, MoEAux]:
    """One forward pass. It does not differ in training, unless the experts draw.

    Args:
      x_BLD: activations of any float dtype. The softmaxes are computed in float32.
      context: only its mask is read, and its keys if the experts draw.

    Returns:
      y_BLD, and a `MoEAux` without losses. Its counts are soft: the tokens of an expert are the combine
      weights of its slots, summed over tokens. They add up to the number of valid tokens. (Dispatch weights
      say nothing about load, because those of a slot always sum to 1.) The entropy is that of a token's
      combine weights over experts.
    """
    mask_BL = context.mask_of(x_BLD)
    dispatch_BLEC, combine_BLEC = self._weights(x_BLD, mask_BL)
    network = self.experts.for_step(context.drawing_key)
    experts = as_experts(network, x_BLD.dtype, gather=True)
    valid_BLD = jnp.where(mask_BL[..., None], x_BLD, 0)  # padding may hold anything, also infinity
    rows_BECD = jnp.einsum("BLEC,BLD->BECD", dispatch_BLEC.astype(x_BLD.dtype), valid_BLD)
    if network.draws:
      rows_BECD, experts = with_row_bits(rows_BECD, context.random_bits(*rows_BECD.shape[1:3]), experts)
    rows_BECD = run_experts(experts, rows_BECD, constrain)[..., : x_BLD.shape[-1]]
    y_BLD = jnp.einsum("BLEC,BECD->BLD", combine_BLEC.astype(x_BLD.dtype), rows_BECD)
    y_BLD = constrain(y_BLD, ("batch", None, None))
    if self.shared is not None:
      y_BLD = y_BLD + self.shared(x_BLD)[0]
    return y_BLD, self._aux(combine_BLEC, mask_BL, context)

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

  def _aux(self, combine_BLEC: Array, mask_BL: Array, context: Context) -> MoEAux:
    combine_BLE = combine_BLEC.sum(axis=-1)
    tokens_per_expert_BE = combine_BLE.sum(axis=1)
    domain_BS = context.domain_one_hot(mask_BL)
    layer = LayerRecord(
      tokens_per_expert_BE, tokens_per_expert_BE.sum(axis=0), combine_BLE, mask_BL, domain_BS
    )
    return jax.lax.stop_gradient(MoEAux({}, None, *layer[:2], observe(layer)))


def _unit(x: Array, axis: int) -> Array:
  return x * jax.lax.rsqrt(jnp.sum(x * x, axis=axis, keepdims=True) + EPSILON)
