"""Which tensor of a checkpoint holds which parameter."""

import functools
from collections.abc import Container, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from moe_jax.config import BlockConfig
from moe_jax.errors import InputError
from moe_jax.interop.families import Family
from moe_jax.interop.layout import Layout
from moe_jax.interop.source import Names, Source
from moe_jax.nn.moe import MoE
from moe_jax.nn.transformer import Transformer
from moe_jax.nn.variables import BalancerState

LAYER = "model.layers.{l}."
Path = tuple[str | int, ...]


class Piece(NamedTuple):
  """A part of a parameter that lies in one tensor: parameter[lead]."""

  lead: tuple[int, ...]  # the repetition of the segment, and the expert or part
  name: str  # of the tensor
  layout: Layout


class Stored(NamedTuple):
  """A variable of the model, or the bias in the state of a balancer, with its pieces."""

  path: Path
  shape: tuple[int, ...]
  pieces: tuple[Piece, ...]


def stored_parameters(
  model: Transformer, family: Family, present: Container[str] | None = None
) -> Iterator[Stored]:
  """Yields every parameter of `model`, and every bias of a balancer, with the tensors that hold them.

  A family whose layers all have a bias gets one for balancers without, too. Its value is 0 then.

  Args:
    model: may be abstract.
    family: has the names of the tensors.
    present: the tensors of a checkpoint, by which one of several entries is chosen. None: the first.

  Raises:
    InputError: if a parameter has no tensor.
  """
  names_of = functools.cache(lambda block: family.names(model.config, block))
  for path, variable in nnx.to_flat_state(nnx.state(model)):
    place, value = _place(model, path), bias_of(model, path, variable)
    names = names_of(place.block)
    if value is not None:
      yield _stored(path, tuple(value.shape), place, names, present)
    elif place.key in names:
      lead = (len(place.layers),) if place.stacked else ()
      num_experts = module_at(model, path[:-1]).num_scored_experts
      yield _stored(path, (*lead, num_experts), place, names, present)


class _Place(NamedTuple):
  """Where a variable is in the model."""

  key: str  # in `Names`
  layers: tuple[int, ...]  # its layer in each repetition; empty outside of layers
  stacked: bool  # whether the variable has an axis of repetitions
  block: BlockConfig  # that it belongs to; the first one for what is outside of layers


def _place(model: Transformer, path: Path) -> _Place:
  config, key = model.config, lambda *names: ".".join(map(str, names))
  if path[0] == "segments":
    _, i, _, _, j, *rest = path
    segment, size = model.segments[i], len(model.segments[i].pattern.blocks)
    layers = tuple(segment.first_layer + r * size + j for r in range(segment.repeats))
    return _Place(key(*rest), layers, True, config.blocks[i].pattern[j])
  if path[0] == "successors":
    _, i, *rest = path
    in_block = rest[0] == "stack"
    layers = (model.successors[i].stack.first_layer,)
    return _Place(
      key(*rest[4:]) if in_block else key("successor", *rest), layers, in_block, config.last_block
    )
  return _Place(key(*path), (), False, config.blocks[0].pattern[0])


def _stored(
  path: Path, shape: tuple[int, ...], place: _Place, names: Names, present: Container[str] | None
) -> Stored:
  sources = names.get(place.key, ())
  if not sources:
    raise InputError(f"a checkpoint of this family has no tensor for {place.key} {list(shape)}")
  if sources[0].index is not None:  # together they are the parameter
    return Stored(path, shape, tuple(piece for one in sources for piece in _pieces(one, shape, place)))
  has = lambda one: present is None or next(_pieces(one, shape, place)).name in present
  chosen = next((one for one in sources if has(one)), sources[0])
  return Stored(path, shape, tuple(_pieces(chosen, shape, place)))


def _pieces(source: Source, shape: tuple[int, ...], place: _Place) -> Iterator[Piece]:
  name = (LAYER if place.layers else "") + source.name
  for r, layer in enumerate(place.layers or (None,)):
    lead = (r,) if place.stacked else ()
    if source.index is not None:
      yield Piece((*lead, source.index), name.format(l=layer), source.layout)
    elif "{e}" in source.name:
      for e in range(shape[len(lead)]):
        yield Piece((*lead, e), name.format(l=layer, e=e), source.layout)
    else:
      yield Piece(lead, name.format(l=layer), source.layout)


def module_at(model: nnx.Module, path: Path) -> Any:
  """Returns the part of a model at this path."""
  for key in path:
    model = model[key] if isinstance(key, int) else getattr(model, key)
  return model


def bias_of(model: Transformer, path: Path, variable: nnx.Variable) -> Any:
  """Returns the value of a variable. Of a balancer's state, the bias of the choice of experts, or None if it has none."""
  if not isinstance(variable, BalancerState):
    return variable.get_value()
  index = bias_index(module_at(model, path[:-1]))
  return None if index is None else jax.tree.leaves(variable.get_value())[index]


def bias_index(layer: MoE) -> int | None:
  """Returns which leaf of the state of a layer's balancer is the bias, or None.

  Raises:
    InputError: if the bias is not an array of the state.
  """
  state = layer.balancer.init(layer.num_scored_experts)
  leaves, tree = jax.tree.flatten(state)
  marked = [np.full(np.shape(leaf), i, np.float32) for i, leaf in enumerate(leaves)]
  bias = layer.balancer.bias(jax.tree.unflatten(tree, marked))
  if bias is None:
    return None
  found = [
    i for i, leaf in enumerate(marked) if leaf.shape == np.shape(bias) and leaf.size and (leaf == bias).all()
  ]
  if len(found) != 1:
    raise InputError("the bias of this balancer is not one array of its state, so no checkpoint can hold it")
  return found[0]
