"""What one layer and one batch add to an examination: counts over tokens, experts, domains, positions and pairs."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.types import Array, MoEAux

NUM_BINS = 16  # of positions in a window


class Sums(NamedTuple):
  """Sums over tokens. All but `per_sequence_BE` add over batches.

  Several choices of a token may stand for one merged expert: these are several assignments, and one token.
  """

  by_domain_SE: Array  # assignments of tokens of the domain to the expert, before capacity
  by_position_XE: Array  # the same by position, in `NUM_BINS` equal parts of a window
  by_token_XE: Array  # tokens that are sent to the expert, by id: those that are named, and all others
  together_XE: Array  # tokens that are sent to both experts; the diagonal has those of each
  before_XE: Array  # tokens that are sent to one expert, and in the layer before to the other
  entropy: Array  # [], nats, of the router's scores divided by their sum
  reached_X: Array  # tokens that reach 0, 1, ... devices; NaN where the devices do not divide the experts
  per_sequence_BE: Array  # assignments of each sequence to the expert


class Tokens(NamedTuple):
  """What is known of the tokens of a batch."""

  mask_BL: Array
  domain_BS: Array  # one-hot
  place_BL: Array  # int32, which of the named token ids, or their number


@functools.partial(jax.jit, static_argnames=("num_named", "num_devices"))
def sums_of_layer(
  layer: MoEAux, before_BLE: Array | None, tokens: Tokens, num_named: int, num_devices: int
) -> Sums:
  """Returns the sums of one layer and one batch.

  Args:
    layer: with `selected_BLE`, see `Context.record_logits`.
    before_BLE: the selection of the layer with experts before it; None: it is the first.
    tokens: of the batch.
    num_named: token ids that are counted by themselves.
    num_devices: over which the experts would be spread.
  """
  selected_BLE, length = layer.selected_BLE.astype(jnp.float32), layer.selected_BLE.shape[1]
  num_experts = selected_BLE.shape[-1]
  is_sent_BLE = jnp.minimum(selected_BLE, 1)
  bin_LX = jax.nn.one_hot(jnp.arange(length) * NUM_BINS // length, NUM_BINS)
  by_token_XE = jnp.zeros((num_named + 1, num_experts))
  before = jnp.zeros((*selected_BLE.shape[:2], 0)) if before_BLE is None else jnp.minimum(before_BLE, 1)
  return Sums(
    by_domain_SE=jnp.einsum("BLE,BS->SE", selected_BLE, tokens.domain_BS),
    by_position_XE=jnp.einsum("BLE,LX->XE", selected_BLE, bin_LX),
    by_token_XE=by_token_XE.at[tokens.place_BL.reshape(-1)].add(is_sent_BLE.reshape(-1, num_experts)),
    together_XE=jnp.einsum("BLX,BLE->XE", is_sent_BLE, is_sent_BLE),
    before_XE=jnp.einsum("BLX,BLE->XE", before.astype(jnp.float32), is_sent_BLE),
    entropy=layer.metrics["router_entropy"][0],
    reached_X=reached_devices(selected_BLE, tokens.mask_BL, num_devices),
    per_sequence_BE=selected_BLE.sum(axis=1),
  )


def reached_devices(selected_BLE: Array, mask_BL: Array, num_devices: int) -> Array:
  """Returns the number of tokens that reach 0, 1, ... devices. Experts lie on them in order, equally many on each.

  NaN if that cannot be.
  """
  if selected_BLE.shape[-1] % num_devices:
    return jnp.full(num_devices + 1, jnp.nan)
  own = selected_BLE.reshape(*mask_BL.shape, num_devices, -1)
  reached_BLX = jax.nn.one_hot((own.max(axis=-1) > 0).sum(axis=-1), num_devices + 1)
  return (reached_BLX * mask_BL[..., None]).sum(axis=(0, 1))
