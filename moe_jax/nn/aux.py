"""Reads the aux of a model, and updates its balancers. For any training loop, including ours."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.errors import InputError
from moe_jax.nn.moe import MoE
from moe_jax.ops.metrics import METRICS
from moe_jax.types import Array, Maximum, MixerAux, MoEAux, PyTree


def moe_auxes(aux: PyTree) -> list[MoEAux]:
  """Returns every `MoEAux` of a tree, in order.

  The arrays of those of a segment have a leading axis of repetitions.
  """
  leaves = jax.tree.leaves(aux, is_leaf=lambda leaf: isinstance(leaf, MoEAux))
  return [leaf for leaf in leaves if isinstance(leaf, MoEAux)]


def mixer_auxes(aux: PyTree) -> list[MixerAux]:
  """Returns every `MixerAux` of a tree, in order."""
  leaves = jax.tree.leaves(aux, is_leaf=lambda leaf: isinstance(leaf, MixerAux))
  return [leaf for leaf in leaves if isinstance(leaf, MixerAux)]


def _is_maximum(leaf: PyTree) -> bool:
  return isinstance(leaf, Maximum)


def added(a: PyTree, b: PyTree) -> PyTree:
  """Returns the aux of two micro-batches together: sums, and the larger of each `Maximum`."""
  both = lambda x, y: Maximum(jnp.maximum(x.value, y.value)) if _is_maximum(x) else x + y
  return jax.tree.map(both, a, b, is_leaf=_is_maximum)


def nothing(shapes: PyTree) -> PyTree:
  """Returns the aux of no micro-batch, of these shapes: zeros, and -inf for each `Maximum`."""

  def of(leaf: PyTree) -> PyTree:
    if _is_maximum(leaf):
      return Maximum(jnp.full(leaf.value.shape, -jnp.inf, leaf.value.dtype))
    return jnp.zeros(leaf.shape, leaf.dtype)

  return jax.tree.map(of, shapes, is_leaf=_is_maximum)


def by_layer(segments: list[list[Array]]) -> Array:
  """Returns an array [R, ...] in the order of the layers.

  Args:
    segments: for each segment, a list with an array [repetitions, ...] for each block of its pattern. If the
      last axis differs between layers, for example because they have different numbers of experts, the
      shorter ones end in NaN.
  """
  arrays = [jnp.stack(blocks, axis=1).reshape(-1, *blocks[0].shape[1:]) for blocks in map(_padded, segments)]
  return jnp.concatenate(_padded(arrays)) if len(arrays) > 1 else arrays[0]


def _padded(arrays: list[Array]) -> list[Array]:
  if arrays[0].ndim < 2 or len({a.shape[-1] for a in arrays}) == 1:
    return arrays
  width = max(a.shape[-1] for a in arrays)
  pad = lambda a: [(0, 0)] * (a.ndim - 1) + [(0, width - a.shape[-1])]
  return [jnp.pad(a.astype(jnp.float32), pad(a), constant_values=jnp.nan) for a in arrays]


def segments_of(aux: PyTree) -> list[list[MoEAux]]:
  """Returns the `MoEAux` of each segment's pattern.

  Other trees than the aux of a model, which is a tuple of segments, count as single layers, in the order of `moe_auxes`.
  """
  segments = aux if type(aux) in (tuple, list) else moe_auxes(aux)
  found = [moe_auxes(segment) for segment in segments]
  found = [blocks for blocks in found if blocks]
  one = lambda a: a if a.kept_per_expert_E.ndim == 2 else jax.tree.map(lambda x: x[None], a)
  return [[one(a) for a in blocks] for blocks in found]


def read_metrics(aux: PyTree) -> dict[str, Array]:
  """Returns every metric in `moe_jax.ops.metrics.METRICS` by name, [R, ...].

  The leading axis is over the layers with experts.

  Args:
    aux: the aux of a layer or a model. For several micro-batches, pass the sum of theirs.
  """
  segments = segments_of(aux)
  read = lambda name, block: METRICS[name].read(block.metrics[name])
  return {name: by_layer([[read(name, b) for b in blocks] for blocks in segments]) for name in METRICS}


def losses_by_name(aux: PyTree) -> dict[str, Array]:
  """Returns every balancing loss by name, weight included, with an axis over the layers that have it."""
  segments = segments_of(aux)
  names = dict.fromkeys(name for blocks in segments for b in blocks for name in b.losses)
  with_it = lambda name: [[b.losses[name] for b in blocks if name in b.losses] for blocks in segments]
  return {name: by_layer([blocks for blocks in with_it(name) if blocks]) for name in names}


def num_moe_layers(aux: PyTree) -> int:
  """Returns R, the number of layers with experts."""
  return sum(len(blocks) * blocks[0].kept_per_expert_E.shape[0] for blocks in segments_of(aux))


def balancing_loss(aux: PyTree) -> Array | float:
  """Returns the sum of all balancing losses of all layers.

  The pull of a loss on a router therefore does not depend on how many other layers there are.
  """
  return sum((loss_R.sum() for loss_R in losses_by_name(aux).values()), 0.0)


def update_balancers(model: nnx.Module, aux: PyTree) -> None:
  """Updates the state of all balancers of `model`. Call it once per step, after the optimizer.

  Args:
    model: has any number of `MoE` layers. It is changed in place.
    aux: a tree with the `MoEAux` of each layer, in the order in which flax walks the model (attributes by
      name, lists by index). For several micro-batches, pass the sum of their auxes.

  Raises:
    InputError: if the model and the tree have different numbers of layers.
  """
  layers = [module for _, module in nnx.iter_modules(model) if isinstance(module, MoE)]
  auxes = [a for a in moe_auxes(aux) if a.balancer_stats is not None]
  if len(layers) != len(auxes):
    raise InputError(
      f"update_balancers: the model has {len(layers)} MoE layers, and the tree holds the aux of {len(auxes)}; give "
      "the aux of every layer, in the order of the layers"
    )
  for layer, own in zip(layers, auxes, strict=True):
    layer.balancer_state.set_value(_updated(layer, own))


def _updated(layer: MoE, aux: MoEAux) -> PyTree:
  state: PyTree = layer.balancer_state.get_value()
  if aux.kept_per_expert_E.ndim == 1:
    return layer.balancer.update(state, aux.balancer_stats)
  # The layers of a segment are stacked. Their index gives vmap an axis where there is neither state nor statistics.
  update = lambda index, state, stats: layer.balancer.update(state, stats)
  return jax.vmap(update)(jnp.arange(len(aux.kept_per_expert_E)), state, aux.balancer_stats)
