"""Stores the matrices of routed experts in few bits, and takes them back. All else keeps its type."""

from typing import Any

import jax
import numpy as np

from moe_jax.adapt.layers import Layer, moe_layers, put_together, take_apart
from moe_jax.adapt.wrappers import EXPERTS_PART
from moe_jax.errors import InputError
from moe_jax.nn.experts import EXPERTS
from moe_jax.nn.transformer import Transformer
from moe_jax.ops.quantisation import dequantise as dequantised
from moe_jax.ops.quantisation import format_of
from moe_jax.ops.quantisation import quantise as quantised
from moe_jax.registry import Method, as_inner, inner_spec

PREFIX, _, _, _, REPLACE = EXPERTS_PART
STORED, TRAINED = "quantised", "quantised_training"


def quantise(model: Transformer, format: str = "int8", group: int = 0) -> Transformer:
  """Returns `model` with the matrices of its routed experts in `format`.

  A network `quantised_training` around the experts, with which they were trained, is taken off.

  Args:
    model: has experts.
    format: int8, int4, fp8 or mxfp4, see `moe_jax.ops.quantisation`.
    group: for integers, the rows of an output channel that share a scale; 0: all.

  Raises:
    InputError: if the model has no experts, they are quantised already, or the format does not exist.
  """
  format_of(format, group)
  parts = take_apart(model)
  routed = set(moe_layers(parts))
  layers = [
    _quantised(layer, format, group) if i in routed else layer for i, layer in enumerate(parts.layers)
  ]
  return put_together(parts._replace(layers=tuple(layers)))


def parse_format(text: str) -> tuple[str, int]:
  """Returns (format, group) of a text such as `int8` or `int4:32`.

  Raises:
    InputError: if there is no such format.
  """
  name, colon, group = text.partition(":")
  if colon and not group.isdecimal():
    raise InputError(f"--formats={text}: a group is a number of rows, e.g. int4:32")
  format_of(name, int(group or 0))
  return name, int(group or 0)


def dequantise(model: Transformer) -> Transformer:
  """Returns `model` with the matrices of its experts in float32: it computes the same, and can be trained.

  Raises:
    InputError: if its experts are not quantised.
  """
  parts = take_apart(model)
  layers = [_dequantised(layer) for layer in parts.layers]
  if all(new is old for new, old in zip(layers, parts.layers, strict=True)):
    raise InputError("the experts of the model are not quantised")
  return put_together(parts._replace(layers=tuple(layers)))


def expert_bytes(model: Transformer) -> int:
  """Returns the bytes of the parameters of routed experts, scales included."""
  values = [value for layer in take_apart(model).layers for value in layer.under(PREFIX).values()]
  return sum(x.nbytes for x in jax.tree.leaves(values))


def _inner(method: Method, name: str) -> Method:
  return EXPERTS.resolve(inner_spec(dict(method.options)["experts"])) if method.name == name else method


def _quantised(layer: Layer, format: str, group: int) -> Layer:
  method = layer.block.moe.experts
  if method.name == STORED:
    raise InputError("the experts of the model are quantised already; dequantise them first")
  inner = _inner(method, TRAINED)
  before = f"{PREFIX}experts." if inner is not method else PREFIX
  values: dict[str, Any] = layer.without(PREFIX)
  for path, value in layer.under(before).items():
    if layer.axes[before + path][:1] == ("expert",) and value.ndim == 3 and "." not in path:
      codes, scales = quantised(value, format_of(format, group))
      values[f"{PREFIX}codes.{path}"], values[f"{PREFIX}scales.{path}"] = (
        np.asarray(codes),
        np.asarray(scales),
      )
    else:
      values[f"{PREFIX}experts.{path}"] = value
  if not any(path.startswith(f"{PREFIX}codes.") for path in values):
    raise InputError(
      f"--experts={method}: has no matrices of its own; merge adapters and take dropout off first"
    )
  spec = f"{STORED}:format={format}:group={group}:experts={as_inner(inner)}"
  return Layer(REPLACE(layer.block, EXPERTS.resolve(spec)), values)


def _dequantised(layer: Layer) -> Layer:
  method = layer.block.moe.experts
  if method.name != STORED or not layer.under(PREFIX):
    return layer
  options, own = dict(method.options), layer.under(PREFIX)
  format = format_of(options["format"], options["group"])
  values = layer.without(PREFIX) | {
    f"{PREFIX}{path}": x for path, x in layer.under(f"{PREFIX}experts.").items()
  }
  for path, codes in own.items():
    if path.startswith("codes."):
      name = path.removeprefix("codes.")
      rows = layer_rows(layer, name, codes.shape[1], format.packed)
      w = dequantised(codes, own[f"scales.{name}"], format, rows)
      values[f"{PREFIX}{name}"] = np.asarray(w)
  return Layer(REPLACE(layer.block, _inner(method, STORED)), values)


def layer_rows(layer: Layer, name: str, stored: int, packed: bool) -> int:
  """Returns the rows of a matrix whose codes have `stored` rows; one less than twice as many, if that is its width."""
  if not packed:
    return stored
  width = layer.block.moe.expert_dim if layer.axes[f"{PREFIX}codes.{name}"][1] == "mlp" else None
  return width if width is not None and -(-width // 2) == stored else 2 * stored
