"""Stores the matrices of routed experts in few bits, and takes them back. All else keeps its type."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax.adapt.inputs import Inputs
from moe_jax.adapt.layers import Layer, moe_layers, put_together, take_apart
from moe_jax.adapt.wrappers import EXPERTS_PART
from moe_jax.errors import InputError
from moe_jax.nn.experts import EXPERTS
from moe_jax.nn.transformer import Transformer
from moe_jax.ops import quantisation
from moe_jax.ops.quantisation import Format, format_of
from moe_jax.registry import Method, as_inner

PREFIX, REPLACE = EXPERTS_PART.prefix, EXPERTS_PART.replace
STORED, TRAINED = "quantised", "quantised_training"
POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the mean absolute input
AWARE = "+aware"  # behind a format: with factors from a calibration text
# One program for each shape and format, in place of one for each of some twenty operations.
quantised = jax.jit(quantisation.quantise, static_argnames="format")
dequantised = jax.jit(quantisation.dequantise, static_argnames=("format", "num_rows"))


def quantise(
  model: Transformer, format: str = "int8", group: int = 0, inputs: Inputs | None = None
) -> Transformer:
  """Returns `model` with the matrices of its routed experts in `format`.

  With `inputs`, rows of a matrix are multiplied before they are rounded, and divided after, by a power of the mean absolute
  input of the row (AWQ, 2306.00978, section 3.2): large inputs then meet smaller errors. The power of each expert and
  matrix is the one of `POWERS` with the smallest squared error of the output on these inputs. 0 is one of them, so it is never
  larger than that of rounding alone, and if all inputs are equally large, it is rounding alone. The factors take a float32 per
  row.

  A network `quantised_training` around the experts, with which they were trained, is taken off.

  Args:
    model: has experts.
    format: int8, int4, fp8 or mxfp4, see `moe_jax.ops.quantisation`.
    group: for integers, the rows of an output channel that share a scale; 0: all.
    inputs: of `expert_inputs`, for this model; None: each number is rounded to the nearest.

  Raises:
    InputError: if the model has no experts, they are quantised already, or the format does not exist.
  """
  format_of(format, group)
  parts = take_apart(model)
  routed = set(moe_layers(parts))
  layers = [
    _quantised(layer, format, group, inputs and inputs[i]) if i in routed else layer
    for i, layer in enumerate(parts.layers)
  ]
  return put_together(parts._replace(layers=tuple(layers)))


class Named(NamedTuple):
  """A format with its options."""

  format: str
  group: int
  aware: bool  # whether rows have factors from a calibration text


def parse_format(text: str) -> Named:
  """Returns what a text such as `int8`, `int4:32` or `int4:32+aware` names.

  Raises:
    InputError: if there is no such format.
  """
  name, colon, group = text.removesuffix(AWARE).partition(":")
  if colon and not group.isdecimal():
    raise InputError(f"--formats={text}: a group is a number of rows, e.g. int4:32")
  format_of(name, int(group or 0))
  return Named(name, int(group or 0), text.endswith(AWARE))


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
  return dict(method.inner)["experts"] if method.name == name else method


def scaled_rounding(
  w_EXY: np.ndarray, x_EnX: np.ndarray, format: Format
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns (codes, scales, factors [E, X]) of the rounding with the smallest error of x w, for each expert."""
  size_EX = np.abs(x_EnX).mean(axis=1) + 1e-12
  size_EX /= np.exp(np.log(size_EX).mean(axis=1, keepdims=True))
  best = best_error_E = None
  for power in POWERS:
    factor_EX = (size_EX**power).astype(np.float32)
    stored = [np.asarray(x) for x in quantised(w_EXY * factor_EX[..., None], format)]
    rounded = np.asarray(dequantised(*stored, format, w_EXY.shape[1])) / factor_EX[..., None]
    error_E = np.square(np.einsum("EnX,EXY->EnY", x_EnX, rounded - w_EXY)).sum(axis=(1, 2), dtype=np.float64)
    found = (*stored, factor_EX)
    if best is None:
      best, best_error_E = found, error_E
    is_better_E = error_E < best_error_E
    pick = lambda new, old, is_better_E=is_better_E: np.where(
      is_better_E.reshape(-1, *[1] * (new.ndim - 1)), new, old
    )
    best, best_error_E = tuple(map(pick, found, best)), np.minimum(error_E, best_error_E)
  return best


def _quantised(layer: Layer, format: str, group: int, inputs: Mapping[str, np.ndarray] | None) -> Layer:
  method = layer.block.moe.experts
  if method.name == STORED:
    raise InputError("the experts of the model are quantised already; dequantise them first")
  inner = _inner(method, TRAINED)
  before = f"{PREFIX}experts." if inner is not method else PREFIX
  values: dict[str, Any] = layer.without(PREFIX)
  for path, value in layer.under(before).items():
    if layer.axes[before + path][:1] == ("expert",) and value.ndim == 3 and "." not in path:
      if inputs is None:
        codes, scales = quantised(value, format_of(format, group))
      else:
        codes, scales, values[f"{PREFIX}factors.{path}"] = scaled_rounding(
          value, inputs[path], format_of(format, group)
        )
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
  factors = "false" if inputs is None else "true"
  spec = f"{STORED}:format={format}:group={group}:factors={factors}:experts={as_inner(inner)}"
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
      w = np.asarray(dequantised(codes, own[f"scales.{name}"], format, rows))
      values[f"{PREFIX}{name}"] = w / own[f"factors.{name}"][..., None] if f"factors.{name}" in own else w
  return Layer(REPLACE(layer.block, _inner(method, STORED)), values)


def layer_rows(layer: Layer, name: str, stored: int, packed: bool) -> int:
  """Returns the rows of a matrix whose codes have `stored` rows; one less than twice as many, if that is its width."""
  if not packed:
    return stored
  of_hidden = layer.axes[f"{PREFIX}codes.{name}"][1] in ("mlp", "mlp_block")
  width = layer.block.moe.expert_dim if of_hidden else None
  return width if width is not None and -(-width // 2) == stored else 2 * stored
