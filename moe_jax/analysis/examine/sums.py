"""What one batch adds to an examination: counts over tokens, experts, domains, positions and pairs of experts."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.data import Batch
from moe_jax.nn.aux import by_layer, moe_auxes
from moe_jax.nn.context import Context
from moe_jax.types import Array, MoEAux, PyTree

NUM_BINS = 16  # of positions in a window


class Sums(NamedTuple):
  """Sums over the tokens of a batch, of each layer with experts. All but `per_sequence_RBE` add over batches."""

  tokens: Array  # [], that are no padding
  by_domain_RSE: Array  # tokens of the domain that are sent to the expert, before capacity
  by_position_RXE: Array  # the same by position, in `NUM_BINS` equal parts of a window
  by_token_RXE: Array  # the same by token id: those that are named, and the others together
  together_RXE: Array  # tokens that are sent to both experts; the diagonal has the load
  next_RXE: Array  # [R-1, E, E], tokens that are sent to one expert, and in the next layer to the other
  entropy_R: Array  # nats, of the router's scores divided by their sum
  reached_RX: Array  # tokens that reach 0, 1, ... devices; 0 where the devices do not divide the experts
  per_sequence_RBE: Array  # tokens of each sequence that are sent to the expert


class Sizes(NamedTuple):
  """What is static in the sums of every batch."""

  num_domains: int
  num_devices: int
  num_named: int  # token ids that are counted by themselves
  num_experts: tuple[
    int, ...
  ]  # of each layer; arrays have room for the largest, and zeros beyond a layer's own


def experts_of_layers(model: nnx.Module) -> tuple[int, ...]:
  """Returns the number of experts that the router of each layer scores, in order, computing nothing."""
  graphdef, state = nnx.split(model)
  aux = jax.eval_shape(
    lambda state: _forward(graphdef, state, jnp.zeros((1, 2), jnp.int32), Context()), state
  )
  found: list[int] = []
  for blocks in map(moe_auxes, aux):
    for _ in range(blocks[0].kept_per_expert_E.shape[0] if blocks else 0):
      found += [block.selected_BLE.shape[-1] for block in blocks if block.selected_BLE is not None]
  return tuple(found)


@functools.partial(jax.jit, static_argnames=("graphdef", "sizes"))
def sums_of_batch(
  graphdef: nnx.GraphDef, state: PyTree, batch: Batch, place_V: Array, sizes: Sizes
) -> tuple[Sums, Array]:
  """Returns the sums of a batch, and its router logits [R, B, L, E].

  Args:
    graphdef, state: of the model, as `nnx.split` returns them.
    batch: tokens_BL, mask_BL, domain_B.
    place_V: int32, where each token id is counted: a number below `num_named`, or `num_named`.
    sizes: the sizes.
  """
  context = Context(batch["mask_BL"], domain_B=batch["domain_B"], num_domains=sizes.num_domains)
  aux = _forward(graphdef, state, batch["tokens_BL"], context)
  selected_RBLE = _of_layers(aux, lambda layer: layer.selected_BLE)
  entropy_R = _of_layers(aux, lambda layer: layer.metrics["router_entropy"][0])
  sums = sums_of_choices(selected_RBLE, entropy_R, batch, place_V, sizes)
  return sums, _of_layers(aux, lambda layer: layer.logits_BLE)


def sums_of_choices(
  selected_RBLE: Array, entropy_R: Array, batch: Batch, place_V: Array, sizes: Sizes
) -> Sums:
  """Returns the sums of a batch for any layers, of which `sizes` has the numbers of experts."""
  mask_BL, length = batch["mask_BL"], batch["mask_BL"].shape[1]
  domain_BS = jax.nn.one_hot(batch["domain_B"], sizes.num_domains)
  bin_LX = jax.nn.one_hot(jnp.arange(length) * NUM_BINS // length, NUM_BINS)
  place_A = place_V[batch["tokens_BL"]].reshape(-1)
  by_token = lambda rows_AE: jnp.zeros((sizes.num_named + 1, rows_AE.shape[-1])).at[place_A].add(rows_AE)
  return Sums(
    tokens=mask_BL.sum().astype(jnp.float32),
    by_domain_RSE=jnp.einsum("RBLE,BS->RSE", selected_RBLE, domain_BS),
    by_position_RXE=jnp.einsum("RBLE,LX->RXE", selected_RBLE, bin_LX),
    by_token_RXE=jax.vmap(by_token)(selected_RBLE.reshape(len(selected_RBLE), -1, selected_RBLE.shape[-1])),
    together_RXE=jnp.einsum("RBLX,RBLE->RXE", selected_RBLE, selected_RBLE),
    next_RXE=jnp.einsum("RBLX,RBLE->RXE", selected_RBLE[:-1], selected_RBLE[1:]),
    entropy_R=entropy_R,
    reached_RX=jnp.stack([_reached(s, mask_BL, e, sizes) for s, e in zip(selected_RBLE, sizes.num_experts)]),
    per_sequence_RBE=selected_RBLE.sum(axis=2),
  )


def _forward(graphdef: nnx.GraphDef, state: PyTree, tokens_BL: Array, context: Context) -> PyTree:
  return nnx.merge(graphdef, state)(tokens_BL, context._replace(record_logits=True))[1]


def _of_layers(aux: PyTree, read: Callable[[MoEAux], Array]) -> Array:
  """Returns an array of every layer, [R, ...]. Layers with fewer experts end in zeros."""
  segments = [[read(layer) for layer in moe_auxes(segment)] for segment in aux]
  return jnp.nan_to_num(by_layer([blocks for blocks in segments if blocks]))


def _reached(selected_BLE: Array, mask_BL: Array, num_experts: int, sizes: Sizes) -> Array:
  """Returns the number of tokens that reach 0, 1, ... devices. Experts lie on them in order, equally many on each."""
  if num_experts % sizes.num_devices:
    return jnp.zeros(sizes.num_devices + 1)
  own = selected_BLE[..., :num_experts].reshape(*mask_BL.shape, sizes.num_devices, -1)
  reached_BLX = jax.nn.one_hot((own.max(axis=-1) > 0).sum(axis=-1), sizes.num_devices + 1)
  return (reached_BLX * mask_BL[..., None]).sum(axis=(0, 1))
