"""Networks put around parts of a model, such as low-rank adapters, and taken off again; and changes of what has no parameters."""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax.adapt.layers import Layer, moe_layers, put_together, take_apart
from moe_jax.config import BlockConfig
from moe_jax.errors import InputError, unknown_name
from moe_jax.nn.build import resolve_moe
from moe_jax.nn.experts import EXPERTS
from moe_jax.nn.ffn import FFNS, SHARED_EXPERTS
from moe_jax.nn.low_rank import addition
from moe_jax.nn.mixers import MIXERS
from moe_jax.nn.transformer import Transformer
from moe_jax.registry import Method, Registry, as_inner

LOW_RANK = "low_rank"


def wrap_experts(model: Transformer, wrapper: str, seed: int = 0) -> Transformer:
  """Returns `model` with a network around its experts, e.g. `expert_dropout:rate=0.4` (2101.03961, section 2.4).

  Args:
    model: has experts.
    wrapper: a network with an option `experts`, which becomes the one that the model has.
    seed: of the parameters that the wrapper adds.

  Raises:
    InputError: if the model has no experts, or `wrapper` has no option `experts`.
  """
  parts = take_apart(model)
  routed = set(moe_layers(parts))
  layers = [
    _wrapped(layer, EXPERTS_PART, wrapper) if i in routed else layer for i, layer in enumerate(parts.layers)
  ]
  return put_together(parts._replace(layers=tuple(layers)), seed)


def unwrap_experts(model: Transformer, name: str = "expert_dropout") -> Transformer:
  """Returns `model` without the network `name` around its experts. Parameters of that network are lost.

  Raises:
    InputError: if there is none.
  """
  parts = take_apart(model)
  layers = tuple(_without(layer, EXPERTS_PART, name) for layer in parts.layers)
  _check_found(parts.layers, layers, f"experts {name}")
  return put_together(parts._replace(layers=layers))


def add_adapters(
  model: Transformer,
  rank: int = 8,
  alpha: float = 16.0,
  *,
  parts: Collection[str] | None = None,
  seed: int = 0,
) -> Transformer:
  """Returns `model` with low-rank adapters (LoRA, 2106.09685): it computes the same until they are trained.

  Adapters of experts are of every expert by itself. Shared experts are one network of their summed width.
  `--trained=adapters` trains nothing else.

  Args:
    model: adapters are added to the matrices of some of its parts, which are frozen.
    rank: of the addition to each matrix.
    alpha: the addition is alpha / rank * A B.
    parts: names of `ADAPTABLE`: "experts" (routed ones), "shared" (shared experts), "dense" (feed-forward parts of layers
      without experts), "attention" (mixers). None: all that the model has.
    seed: of A. B is zero.

  Raises:
    InputError: if a matrix has a side shorter than `rank`, the model has adapters already, or it has none of a part that
      is named.
  """
  names = list(dict.fromkeys(ADAPTABLE if parts is None else parts))
  for name in names:
    if name not in ADAPTABLE:
      raise unknown_name("part", name, ADAPTABLE)
  taken = take_apart(model)
  layers = list(taken.layers)
  _check_adaptable(layers, names if parts else (), "experts" in names)
  for part in (ADAPTABLE[name] for name in names):
    for i, layer in enumerate(layers):
      if part.is_in(layer):
        layers[i] = _wrapped(layer, part, f"{LOW_RANK}:rank={rank}:alpha={alpha}")
  adapted = put_together(taken._replace(layers=tuple(layers)), seed)
  for layer in take_apart(adapted).layers:
    _check_rank(layer, rank)
  return adapted


def _check_adaptable(layers: Sequence[Layer], named: Collection[str], with_experts: bool) -> None:
  has = [name for name, part in ADAPTABLE.items() if any(map(part.is_in, layers))]
  for name in named:
    if name not in has:
      raise InputError(f"parts={name}: the model has no {ADAPTABLE[name].words}; it has {', '.join(has)}")
  for layer in layers:
    if any(part.read(layer.block).name == LOW_RANK for part in ADAPTABLE.values()):
      raise InputError("the model has adapters already; merge them first")
    if with_experts and layer.block.ffn.takes("moe") and not EXPERTS_PART.is_in(layer):
      raise InputError(f"ffn {layer.block.ffn}: its experts can have no adapters; choose parts=attention")


def _check_rank(layer: Layer, rank: int) -> None:
  for path, down in layer.values.items():
    if ".adapters.down." in path:
      up = layer.values[path.replace(".down.", ".up.")]
      experts = layer.block.moe.num_experts if path.startswith(ADAPTABLE["experts"].prefix) else 1
      smaller = min(down.size, up.size) // rank // experts
      if rank > smaller:
        weight = path.rpartition(".")[2]
        raise InputError(f"rank={rank}: at most {smaller}, the smaller side of {weight}")


def merge_adapters(model: Transformer) -> Transformer:
  """Returns `model` with its low-rank adapters added to the matrices that they adapt, and without them.

  Raises:
    InputError: if it has none.
  """
  parts = take_apart(model)
  layers = parts.layers
  for part in ADAPTABLE.values():
    layers = tuple(_without(layer, part, LOW_RANK) for layer in layers)
  _check_found(parts.layers, layers, "low-rank adapters")
  return put_together(parts._replace(layers=layers))


class Part(NamedTuple):
  """A part of a layer that another network can be put around."""

  words: str  # what it is, for errors
  prefix: str  # of its paths
  option: str  # of the wrapper, which names what is inside
  registry: Registry
  read: Callable[[BlockConfig], Method]
  replace: Callable[[BlockConfig, Method], BlockConfig]
  # Whether a layer has it. A block without experts still has a configuration of some.
  is_in: Callable[[Layer], bool]


def _part_of_moe(words: str, prefix: str, option: str, registry: Registry, field: str) -> Part:
  in_moe = lambda block, method: dataclasses.replace(block.moe, **{field: method})
  replace = lambda block, method: dataclasses.replace(block, moe=in_moe(block, method))
  read = lambda block: getattr(block.moe, field)
  return Part(words, prefix, option, registry, read, replace, lambda layer: bool(layer.under(prefix)))


def _part_of_block(words: str, name: str, registry: Registry, is_in: Callable[[Layer], bool]) -> Part:
  replace = lambda block, method: dataclasses.replace(block, **{name: method})
  return Part(words, f"{name}.", name, registry, lambda block: getattr(block, name), replace, is_in)


EXPERTS_PART = _part_of_moe("layer with routed experts", "ffn.experts.", "experts", EXPERTS, "experts")
ADAPTABLE = {
  "experts": EXPERTS_PART,
  "shared": _part_of_moe("shared experts", "ffn.shared.", "ffn", SHARED_EXPERTS, "shared_experts"),
  "dense": _part_of_block(
    "layer without experts", "ffn", FFNS, lambda layer: not layer.block.ffn.takes("moe")
  ),
  "attention": _part_of_block("mixer", "mixer", MIXERS, lambda layer: True),
}


def _wrapped(layer: Layer, part: Part, wrapper: str) -> Layer:
  method = part.registry.resolve(f"{wrapper}:{part.option}={as_inner(part.read(layer.block))}")
  own = {f"{part.prefix}{part.option}.{path}": value for path, value in layer.under(part.prefix).items()}
  return Layer(part.replace(layer.block, method), layer.without(part.prefix) | own)


def _without(layer: Layer, part: Part, name: str) -> Layer:
  """A layer without the wrapper `name`; the same layer if it has none."""
  method = part.read(layer.block)
  if method.name != name or not part.is_in(layer):
    return layer
  options = dict(method.options)
  values = layer.under(part.prefix)
  inside = f"{part.option}."
  own = {path.removeprefix(inside): x for path, x in values.items() if path.startswith(inside)}
  for path, down in values.items():
    if path.startswith("adapters.down."):
      weight = path.removeprefix("adapters.down.")
      up, before = values[f"adapters.up.{weight}"], own[weight]
      added = addition(down, up, options["alpha"] / options["rank"], batched=part is EXPERTS_PART)
      own[weight] = (before + np.asarray(added)).astype(before.dtype)
  block = part.replace(layer.block, dict(method.inner)[part.option])
  return Layer(block, layer.without(part.prefix) | {f"{part.prefix}{p}": value for p, value in own.items()})


def _check_found(before: tuple[Layer, ...], after: tuple[Layer, ...], what: str) -> None:
  if all(old is new for old, new in zip(before, after, strict=True)):
    raise InputError(f"the model has no {what}")


def change_moe(model: Transformer, **fields: Any) -> Transformer:
  """Returns `model` with other fields of `MoEConfig` in all layers with experts, e.g. `balancers` or `capacity_factor`.

  A balancer whose state has another shape begins anew.

  Raises:
    InputError: if the model has no experts, or the new layers have other parameters.
  """
  parts = take_apart(model)
  routed = set(moe_layers(parts))
  change = lambda layer: layer._replace(
    block=dataclasses.replace(layer.block, moe=resolve_moe(dataclasses.replace(layer.block.moe, **fields)))
  )
  layers = tuple(change(layer) if i in routed else layer for i, layer in enumerate(parts.layers))
  return put_together(parts._replace(layers=layers))


def set_dropout(model: Transformer, rate: float) -> Transformer:
  """Returns `model` with dropout of what mixers and feed-forward parts add to the residual stream in training.

  Switch tunes with 0.1, and 0.4 in experts (`wrap_experts`; 2101.03961, section 2.4).

  Args:
    model: any.
    rate: the probability; 0: without.

  Raises:
    InputError: if `rate` is not in [0, 1), or a residual of the model has no dropout.
  """
  parts = take_apart(model)
  layers = []
  for layer in parts.layers:
    residual = layer.block.residual
    if "dropout" not in dict(residual.options):
      raise InputError(f"residual {residual}: has no option dropout")
    block = dataclasses.replace(layer.block, residual=residual.with_option("dropout", str(rate)))
    layers.append(layer._replace(block=block))
  return put_together(parts._replace(layers=tuple(layers)))
