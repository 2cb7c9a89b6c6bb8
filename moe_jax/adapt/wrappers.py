"""Parts put around the experts or mixers of a model, such as low-rank adapters, and taken off again."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from moe_jax.adapt.layers import Layer, moe_layers, put_together, take_apart
from moe_jax.config import BlockConfig
from moe_jax.errors import InputError
from moe_jax.nn.build import resolve_moe
from moe_jax.nn.experts import EXPERTS
from moe_jax.nn.low_rank import addition
from moe_jax.nn.mixers import MIXERS
from moe_jax.nn.transformer import Transformer
from moe_jax.registry import Method, as_inner, inner_spec

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
    _wrapped_experts(layer, wrapper) if i in routed else layer for i, layer in enumerate(parts.layers)
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
  experts: bool = True,
  attention: bool = True,
  seed: int = 0,
) -> Transformer:
  """Returns `model` with low-rank adapters (LoRA, 2106.09685): it computes the same until they are trained.

  Adapters of experts are of every expert by itself. `--trained=adapters` trains nothing else.

  Args:
    model: adapters are added to the matrices of its mixers and routed experts, which are frozen.
    rank: of the addition to each matrix.
    alpha: the addition is alpha / rank * A B.
    experts, attention: what gets adapters.
    seed: of A. B is zero.

  Raises:
    InputError: if a matrix has a side shorter than `rank`, the model has adapters already, or no experts to adapt.
  """
  parts = take_apart(model)
  routed = set(moe_layers(parts)) if experts else set()
  new = []
  for i, layer in enumerate(parts.layers):
    if LOW_RANK in (layer.block.mixer.name, getattr(layer.block.moe.experts, "name", "")):
      raise InputError("the model has adapters already; merge them first")
    layer = _wrapped_experts(layer, f"{LOW_RANK}:rank={rank}:alpha={alpha}") if i in routed else layer
    new.append(_wrapped_mixer(layer, f"{LOW_RANK}:rank={rank}:alpha={alpha}") if attention else layer)
  adapted = put_together(parts._replace(layers=tuple(new)), seed)
  for layer in take_apart(adapted).layers:
    _check_rank(layer, rank)
  return adapted


def _check_rank(layer: Layer, rank: int) -> None:
  for path, down in layer.values.items():
    if ".adapters.down." in path:
      up = layer.values[path.replace(".down.", ".up.")]
      experts = layer.block.moe.num_experts if path.startswith(EXPERTS_PART[0]) else 1
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
  layers = tuple(
    _without(_without(layer, EXPERTS_PART, LOW_RANK), MIXER_PART, LOW_RANK) for layer in parts.layers
  )
  _check_found(parts.layers, layers, "low-rank adapters")
  return put_together(parts._replace(layers=layers))


def _experts_of(block: BlockConfig, method: Method) -> BlockConfig:
  return dataclasses.replace(block, moe=dataclasses.replace(block.moe, experts=method))


# The path of a part, the option that names what it wraps, its registry, how to read it and to replace it.
EXPERTS_PART = ("ffn.experts.", "experts", EXPERTS, lambda block: block.moe.experts, _experts_of)
MIXER_PART = (
  "mixer.",
  "mixer",
  MIXERS,
  lambda block: block.mixer,
  lambda b, m: dataclasses.replace(b, mixer=m),
)
Part = tuple[str, str, object, Callable, Callable]


def _wrapped_experts(layer: Layer, wrapper: str) -> Layer:
  return _wrapped(layer, EXPERTS_PART, wrapper)


def _wrapped_mixer(layer: Layer, wrapper: str) -> Layer:
  return _wrapped(layer, MIXER_PART, wrapper)


def _wrapped(layer: Layer, part: Part, wrapper: str) -> Layer:
  prefix, option, registry, read, replace = part
  method = registry.resolve(f"{wrapper}:{option}={as_inner(read(layer.block))}")
  own = {f"{prefix}{option}.{path}": value for path, value in layer.under(prefix).items()}
  return Layer(replace(layer.block, method), layer.without(prefix) | own)


def _without(layer: Layer, part: Part, name: str) -> Layer:
  """A layer without the wrapper `name`; the same layer if it has none."""
  prefix, option, registry, read, replace = part
  method = read(layer.block)
  if method.name != name or not layer.under(prefix):
    return layer
  options = dict(method.options)
  values = layer.under(prefix)
  own = {path.removeprefix(f"{option}."): x for path, x in values.items() if path.startswith(f"{option}.")}
  for path, down in values.items():
    if path.startswith("adapters.down."):
      weight = path.removeprefix("adapters.down.")
      up, before = values[f"adapters.up.{weight}"], own[weight]
      added = addition(down, up, options["alpha"] / options["rank"], batched=part is EXPERTS_PART)
      own[weight] = (before + np.asarray(added)).astype(before.dtype)
  block = replace(layer.block, registry.resolve(inner_spec(options[option])))
  return Layer(block, layer.without(prefix) | {f"{prefix}{path}": value for path, value in own.items()})


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
