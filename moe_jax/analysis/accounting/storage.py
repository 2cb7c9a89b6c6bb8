"""Bytes of weights by type, and of optimizer state. Nothing is allocated."""

import dataclasses
import math
from typing import NamedTuple

import jax
from flax import nnx

from moe_jax.analysis.accounting.parameters import MODULES, count
from moe_jax.config import OptimizerConfig
from moe_jax.nn.transformer import Transformer
from moe_jax.training.muon import NOT_HIDDEN
from moe_jax.training.optim import OPTIMIZERS, make_optimizer


class WeightType(NamedTuple):
  """How a type stores the matrices of a model's layers. Every block of numbers shares one scale."""

  bits: int
  scale_bits: int = 0
  rows: int = 1  # of a block, along the inputs; 0: all of them
  columns: int = 1

  def bytes(self, num_in: int, num_out: int) -> float:
    """Returns the bytes of one matrix, whose last blocks may be cut off."""
    rows, columns = self.rows or num_in, self.columns
    scales = math.ceil(num_in / rows) * math.ceil(num_out / columns) if self.scale_bits else 0
    return (self.bits * num_in * num_out + self.scale_bits * scales) / 8


# The types with scales store the matrices of mixers, experts and dense parts. Embedding, output matrix, router, norms and
# biases, which DeepSeek-V3 (2412.19437, section 3.3.1) also keeps in a higher precision, are bfloat16 then.
WEIGHT_TYPES = {
  "float32": WeightType(32),
  "bfloat16": WeightType(16),
  "fp8": WeightType(8, scale_bits=32, rows=128, columns=128),  # the blocks of DeepSeek-V3
  "int8": WeightType(8, scale_bits=32, rows=0),  # a scale per output
  "int4": WeightType(4, scale_bits=16, rows=32),
}


def weight_bytes(model: Transformer) -> dict[str, int]:
  """Returns the bytes of all that `count` counts of `model`, which may be abstract, by type."""
  shapes = [_matrices(variable) for _, variable in _parameters(model)]
  others = count(model).parameters.total - sum(
    n * rows * columns for n, rows, columns in filter(None, shapes)
  )
  found = {}
  for name, kind in WEIGHT_TYPES.items():
    of_matrices = sum(n * kind.bytes(rows, columns) for n, rows, columns in filter(None, shapes))
    found[name] = round(of_matrices + others * (4 if kind.bits == 32 else 2))
  return found


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
