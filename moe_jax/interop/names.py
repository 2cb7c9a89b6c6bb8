"""Which tensor of a checkpoint holds which parameter."""

import functools
from collections.abc import Container, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

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

  lead: tuple[int, ...]  # the repetition of the segment, and the expert
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

  Args:
    model: may be abstract.
    family: has the names of the tensors.
    present: the tensors of a checkpoint, by which one of several entries is chosen. None: the first.

  Raises:
    InputError: if a parameter has no tensor.
  """
  blocks = model.config.blocks
  names_of = functools.cache(
    lambda segment, block: family.names(model.config, blocks[segment].pattern[block])
  )
  for path, variable in nnx.to_flat_state(nnx.state(model)):
    if isinstance(variable, BalancerState):
      bias = bias_of(model, path, variable)
      if bias is None:
        continue
      shape = bias.shape
    else:
      shape = variable.get_value().shape
    yield _stored(model, path, tuple(shape), names_of(*_block(path)), present)


def _block(path: Path) -> tuple[int, int]:
  """The segment and the block of its pattern that a variable belongs to; the first for those outside of blocks."""
  return (path[1], path[4]) if path[0] == "segments" else (0, 0)


def _stored(
  model: Transformer, path: Path, shape: tuple[int, ...], names: Names, present: Container[str] | None
) -> Stored:
  if path[0] != "segments":
    key, prefix, repeats = ".".join(map(str, path)), "", None
  else:
    key, prefix, repeats = ".".join(map(str, path[5:])), LAYER, shape[0]
  sources = names.get(key, ())
  if not sources:
    raise InputError(f"a checkpoint of this family has no tensor for {key} {list(shape)}")

  def pieces(one: Source) -> Iterator[Piece]:
    per_expert = "{e}" in one.name
    for r in range(1 if repeats is None else repeats):
      lead = () if repeats is None else (r,)
      layer = None if repeats is None else _layer(model, path, r)
      name = prefix + one.name
      if not per_expert:
        yield Piece(lead, name.format(l=layer), one.layout)
        continue
      for e in range(shape[len(lead)]):
        yield Piece((*lead, e), name.format(l=layer, e=e), one.layout)

  has = lambda one: present is None or next(pieces(one)).name in present
  chosen = next((one for one in sources if has(one)), sources[0])
  return Stored(path, shape, tuple(pieces(chosen)))


def _layer(model: Transformer, path: Path, repetition: int) -> int:
  """The number of the layer that a parameter of a segment belongs to."""
  segment = model.segments[path[1]]
  return segment.first_layer + repetition * len(segment.pattern.blocks) + path[4]


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
