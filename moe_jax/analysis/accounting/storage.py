"""Bytes of weights by type, and of optimizer state. Nothing is allocated."""

import dataclasses
import math

import jax
from flax import nnx

from moe_jax.analysis.accounting.parameters import MODULES, count
from moe_jax.config import OptimizerConfig
from moe_jax.nn.experts.quantised import quantised_matrices
from moe_jax.nn.transformer import Transformer
from moe_jax.ops.quantisation import FORMATS, Format, format_of
from moe_jax.training.muon import NOT_HIDDEN
from moe_jax.training.optim import OPTIMIZERS, make_optimizer

# The types that matrices of mixers, experts and dense parts are stored in, as `moe_jax.adapt.quantise` stores those of
# experts. Embedding, output matrix, router, norms and biases, which DeepSeek-V3 (2412.19437, section 3.3.1) also keeps
# in a higher precision, are bfloat16 then.
QUANTISED = {
  "fp8": FORMATS["fp8"],
  "int8": FORMATS["int8"],
  "int4": format_of("int4", group=128),
  "mxfp4": FORMATS["mxfp4"],
}


def matrix_bytes(format: Format, rows: int, columns: int) -> int:
  """Returns the bytes of the codes and scales of one matrix, whose last blocks may be cut off."""
  block_rows, block_columns = format.block[0] or rows, format.block[1]
  scales = math.ceil(rows / block_rows) * math.ceil(columns / block_columns)
  codes = math.ceil(rows / 2) if format.packed else rows
  return codes * columns + scales * (1 if format.power_of_two else 4)


def weight_bytes(model: Transformer) -> dict[str, int]:
  """Returns the bytes of all that `count` counts of `model`, which may be abstract, by type."""
  total = count(model).parameters.total
  shapes = [shape for shape in (_matrices(variable) for _, variable in _parameters(model)) if shape]
  shapes += quantised_matrices(model.segments)
  others = 2 * (total - sum(n * rows * columns for n, rows, columns in shapes))
  stored = {
    name: others + sum(n * matrix_bytes(format, rows, columns) for n, rows, columns in shapes)
    for name, format in QUANTISED.items()
  }
  return {"float32": 4 * total, "bfloat16": 2 * total} | stored


def _parameters(model: Transformer) -> list[tuple[tuple, nnx.Variable]]:
  """The parameters of the model by path, without its modules of multi-token prediction."""
  flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
  return [(path, variable) for path, variable in flat if path[0] != MODULES]


def _matrices(variable: nnx.Variable) -> tuple[int, int, int] | None:
  """Returns (number, inputs, outputs) of the matrices of a parameter in the layers; None for other parameters."""
  metadata, shape = variable.get_metadata(), variable.get_value().shape
  axes = metadata["logical_axes"]
  if "num_in" not in metadata or NOT_HIDDEN & set(axes):
    return None
  own = shape[len(shape) - len(axes) :]
  sizes = [size for size, name in zip(own, axes, strict=True) if name != "expert"]
  num_in = metadata["num_in"]
  rows, columns = math.prod(sizes[:num_in]), math.prod(sizes[num_in:])
  return math.prod(shape) // (rows * columns), rows, columns


def optimizer_bytes(model: Transformer) -> dict[str, int]:
  """Returns the bytes of the state of each optimizer of this package for what `count` counts of `model`."""
  params = nnx.from_flat_state(_parameters(model))
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
  found = {}
  for name in sorted(OPTIMIZERS.builtin):
    optimizer = make_optimizer(dataclasses.replace(OptimizerConfig(), optimizer=name), num_steps=1)
    leaves = jax.tree.leaves(jax.eval_shape(optimizer.init, abstract))
    found[name] = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
  return found
