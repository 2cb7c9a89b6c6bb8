"""Takes a model apart into its layers, and puts layers together to a model."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from moe_jax.config import BlockConfig, ModelConfig, Segment
from moe_jax.errors import InputError
from moe_jax.nn.build import resolve
from moe_jax.nn.transformer import Transformer
from moe_jax.nn.variables import BalancerState

Values = Mapping[
  str, Any
]  # dotted path in a block or model -> NumPy array, or the tree of a balancer's state


class Layer(NamedTuple):
  """One block of a model, on its own."""

  block: BlockConfig  # resolved, with its own MoEConfig
  values: Values
  axes: Mapping[str, tuple] = {}  # the logical axes of each value that the model names them of

  def under(self, prefix: str) -> dict[str, Any]:
    """Returns the values whose path begins with `prefix`, which ends with a dot, without it."""
    return {path.removeprefix(prefix): x for path, x in self.values.items() if path.startswith(prefix)}

  def without(self, *prefixes: str) -> dict[str, Any]:
    """Returns the values whose path begins with none of `prefixes`."""
    return {path: x for path, x in self.values.items() if not path.startswith(prefixes)}


class Parts(NamedTuple):
  """A model in parts, on the host."""

  config: ModelConfig  # resolved
  values: Values  # of the embedding, the last norm, the output matrix
  layers: tuple[Layer, ...]  # from the first to the last


def take_apart(model: Transformer) -> Parts:
  """Returns the parts of a model. Arrays keep their types."""
  outer: dict[str, Any] = {}
  axes: dict[tuple[int, int], dict[str, tuple]] = {}
  stacked: dict[tuple[int, int], dict[str, Any]] = {}
  for path, variable in nnx.to_flat_state(nnx.state(model)):
    value = jax.tree.map(np.asarray, jax.device_get(variable.get_value()))
    if path[0] == "segments":
      stacked.setdefault((path[1], path[4]), {})[_dotted(path[5:])] = value
      named = variable.get_metadata().get("logical_axes")
      axes.setdefault((path[1], path[4]), {}).update({} if named is None else {_dotted(path[5:]): named})
    else:
      outer[_dotted(path)] = value
  layers = []
  for i, segment in enumerate(model.config.blocks):
    for repetition in range(segment.repeats):
      for j, block in enumerate(segment.pattern):
        values = stacked.get((i, j), {})
        own = {path: jax.tree.map(lambda x, r=repetition: x[r], value) for path, value in values.items()}
        layers.append(Layer(block, own, axes.get((i, j), {})))
  return Parts(model.config, outer, tuple(layers))


def put_together(parts: Parts, seed: int = 0) -> Transformer:
  """Returns the model of `parts`.

  Parameters that a layer lacks get initial values, drawn from `seed`. A balancer's state begins anew if it is lacking
  or of another shape.

  Raises:
    InputError: if a value has another shape than the configuration says, or no place in it.
  """
  config = with_blocks(parts.config, [layer.block for layer in parts.layers])
  vocab_size = parts.values["embedding_VD"].shape[0]
  made: list[Transformer] = []
  jax.eval_shape(lambda: made.append(Transformer(config, vocab_size, rngs=nnx.Rngs(0))))
  abstract, fresh = made[0], _Fresh(config, vocab_size, seed)
  filled, used = [], set()
  for path, variable in nnx.to_flat_state(nnx.state(abstract)):
    if path[0] == "segments":
      name, own = _dotted(path[5:]), _layers_of(config, path[1], path[4])
      used.update((layer, name) for layer in own)
      of_layers = [parts.layers[layer].values.get(name) for layer in own]
      value = _stacked(_dotted(path), variable, of_layers, fresh)
    else:
      value = _outer(parts, _dotted(path))
    _check_shape(_dotted(path), value, variable)
    filled.append((path, variable.replace(jax.device_put(value))))
  for i, layer in enumerate(parts.layers):
    for name in layer.values:
      is_state = name.endswith("balancer_state")
      if (i, name) not in used and not is_state:
        raise InputError(
          f"layer {i}: {name} has no place in a block of mixer {layer.block.mixer} and ffn {layer.block.ffn}"
        )
  return nnx.merge(nnx.graphdef(abstract), nnx.from_flat_state(filled))


def _outer(parts: Parts, path: str) -> Any:
  if path in parts.values:
    return parts.values[path]
  raise InputError(
    f"mtp_depth={parts.config.mtp_depth}: the modules of multi-token prediction have the last block of the model, which "
    "would be another one; take them off first (adapt.drop_mtp)"
  )


def drop_mtp(model: Transformer) -> Transformer:
  """Returns `model` without its modules of multi-token prediction. It predicts the next token as before."""
  parts = take_apart(model)
  values = {path: value for path, value in parts.values.items() if not path.startswith("successors.")}
  return put_together(parts._replace(config=dataclasses.replace(parts.config, mtp_depth=0), values=values))


def _stacked(path: str, variable: nnx.Variable, of_layers: list[Any], fresh: "_Fresh") -> Any:
  """The values of a variable in all repetitions, with initial ones where there are none."""
  initial = lambda: jax.tree.map(np.asarray, fresh.value(path))
  values = []
  for repetition, value in enumerate(of_layers):
    own = jax.tree.map(lambda x: x.shape[1:], variable.get_value())
    fits = value is not None and jax.tree.map(np.shape, value) == own
    if value is None or (isinstance(variable, BalancerState) and not fits):
      value = jax.tree.map(lambda x, r=repetition: x[r], initial())
    values.append(value)
  return jax.tree.map(lambda *leaves: np.stack(leaves), *values)


class _Fresh:
  """A newly initialised model, made when the first of its values is asked for."""

  def __init__(self, config: ModelConfig, vocab_size: int, seed: int):
    self._make = lambda: Transformer(config, vocab_size, rngs=nnx.Rngs(seed))
    self._values: dict[str, Any] = {}

  def value(self, path: str) -> Any:
    if not self._values:
      flat = nnx.to_flat_state(nnx.state(self._make()))
      self._values = {_dotted(p): jax.device_get(v.get_value()) for p, v in flat}
    return self._values[path]


def _check_shape(path: str, value: Any, variable: nnx.Variable) -> None:
  shapes = [np.shape(x) for x in jax.tree.leaves(value)]
  right = [x.shape for x in jax.tree.leaves(variable.get_value())]
  if shapes != right:
    raise InputError(f"{path}: has shape {shapes}, and the configuration gives it {right}")


def _layers_of(config: ModelConfig, segment: int, block: int) -> list[int]:
  """The numbers of the layers that are block `block` of the repetitions of a segment."""
  first = sum(len(s.pattern) * s.repeats for s in config.blocks[:segment])
  pattern, repeats = config.blocks[segment].pattern, config.blocks[segment].repeats
  return [first + r * len(pattern) + block for r in range(repeats)]


def with_blocks(config: ModelConfig, blocks: Iterable[BlockConfig]) -> ModelConfig:
  """Returns `config` with these blocks, resolved.

  It says them by the short fields (`num_layers`, `moe`, ...) where those can say them, and otherwise by segments.
  """
  blocks = tuple(blocks)
  if _blocks_of(config) == blocks:
    return config
  short = _in_short(config, blocks)
  if short is not None:
    return resolve(short)
  default = ModelConfig()
  names = ("num_layers", "num_dense_first", "moe_every", "mixer", "ffn", "residual")
  short_fields = {name: getattr(default, name) for name in names}
  return resolve(dataclasses.replace(config, segments=as_segments(blocks), **short_fields))


def _in_short(config: ModelConfig, blocks: tuple[BlockConfig, ...]) -> ModelConfig | None:
  common = {name: {getattr(block, name) for block in blocks} for name in ("moe", "mixer", "residual")}
  sparse = [i for i, block in enumerate(blocks) if block.ffn != config.dense_ffn]
  ffns = {blocks[i].ffn for i in sparse} or {config.dense_ffn}
  if any(len(found) > 1 for found in (*common.values(), ffns)):
    return None
  every = sparse[1] - sparse[0] if len(sparse) > 1 else 1
  fields = {name: found.pop() for name, found in common.items()} | {"ffn": ffns.pop(), "segments": ()}
  fields |= {"num_layers": len(blocks), "moe_every": every}
  first = max(sparse[0] - every + 1, 0) if sparse else 0
  short = dataclasses.replace(config, num_dense_first=first, **fields)
  rest = len(blocks) - first
  return short if rest % every == 0 and _blocks_of(short) == blocks else None


def _blocks_of(config: ModelConfig) -> tuple[BlockConfig, ...]:
  return tuple(block for s in config.blocks for _ in range(s.repeats) for block in s.pattern)


def as_segments(blocks: tuple[BlockConfig, ...]) -> tuple[Segment, ...]:
  """Returns segments that list `blocks`: from each place on, the repeated pattern that covers most, the shortest first."""
  segments, at = [], 0
  while at < len(blocks):
    best = Segment((blocks[at],), 1)
    for period in range(1, (len(blocks) - at) // 2 + 1):
      pattern, repeats = blocks[at : at + period], 1
      while blocks[at + repeats * period : at + (repeats + 1) * period] == pattern:
        repeats += 1
      if repeats > 1 and repeats * period > best.repeats * len(best.pattern):
        best = Segment(pattern, repeats)
    segments.append(best)
    at += best.repeats * len(best.pattern)
  return tuple(segments)


def moe_layers(parts: Parts) -> list[int]:
  """Returns the numbers of the layers whose feed-forward part routes tokens to experts.

  Raises:
    InputError: if there are none.
  """
  found = [
    i for i, layer in enumerate(parts.layers) if any(p.startswith("ffn.experts.") for p in layer.values)
  ]
  if not found:
    raise InputError("the model has no layer with routed experts; upcycle makes some")
  return found


def _dotted(path: tuple) -> str:
  return ".".join(map(str, path))
