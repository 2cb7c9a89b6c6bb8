"""Counts the floating-point operations that a model needs, and those of a compiled program.

Only matrix products count, because the hardware's peak refers to them. A multiplication and an addition are 2
operations.
"""

import dataclasses
import functools
import math
import re
from typing import NamedTuple

import numpy as np

from moe_jax.analysis import matrices
from moe_jax.analysis.hlo import Instruction, Program, arrays, called
from moe_jax.config import Config, ModelConfig, Segment
from moe_jax.nn.build import resolve

_AGAIN = ("full", "exchange")  # forms of remat in which the backward pass repeats products


class ModelFlops(NamedTuple):
  """Operations of one forward pass over one token, by part of the model, summed over all layers.

  Not counted: embedding look-up, norms, activations, softmax, sorting and moving tokens, losses, the optimizer.
  """

  attention_projections: float  # or what another token mixer multiplies by
  attention_scores: float  # with other positions, and the mixture of their values; or with a recurrent state
  router: float
  experts: float  # of the K that a token is sent to
  shared_experts: float
  dense: float  # feed-forward parts without experts, and those beside experts
  head: float

  @property
  def forward(self) -> float:
    return sum(self)

  @property
  def layers(self) -> float:
    return self.forward - self.head


def forward_flops(
  model: ModelConfig, vocab_size: int, sequence_length: int, decoding: bool = False
) -> ModelFlops:
  """Returns the operations for one token of a sequence of `sequence_length`, on average.

  With `decoding`, those of its last token, behind a cache of all others. Counts the matrices of the model's blocks,
  so it holds for any blocks, and any networks of experts. `moe_jax.analysis.positions` counts the rest.

  Raises:
    InputError: `model` has a wrong field, or parts that do not fit together.
  """
  total = dict.fromkeys(ModelFlops._fields, 0.0)
  for block, repeats in matrices.of_model(resolve(model), sequence_length):
    of_block = {
      "attention_projections": block.mixer,
      "attention_scores": block.positions_decoding if decoding else block.positions,
      "router": block.router,
      "experts": block.experts_of_token,
      "shared_experts": block.shared_experts,
      "dense": block.dense,
    }
    for part, size in of_block.items():
      total[part] += repeats * 2 * size
  return ModelFlops(**total | {"head": 2 * model.model_dim * vocab_size})


class ModuleFlops(NamedTuple):
  """Operations of one forward pass over one token in all modules of multi-token prediction, which only training runs."""

  parts: ModelFlops  # of their blocks, and of the output matrix
  join: float  # the matrix in front of each block

  @property
  def forward(self) -> float:
    return self.parts.forward + self.join


def module_flops(model: ModelConfig, vocab_size: int, sequence_length: int) -> ModuleFlops:
  """Returns the operations of the modules of multi-token prediction."""
  one = forward_flops(_of_module(model), vocab_size, sequence_length)
  return ModuleFlops(
    ModelFlops(*(model.mtp_depth * part for part in one)), model.mtp_depth * 4 * model.model_dim**2
  )


def _of_module(model: ModelConfig) -> ModelConfig:
  """Returns a model of the block that each module of multi-token prediction has, alone."""
  short = ("num_layers", "num_dense_first", "moe_every", "mixer", "ffn", "residual")
  alone = {name: getattr(ModelConfig, name) for name in short} | {"segments": (Segment((model.last_block,)),)}
  return dataclasses.replace(model, **alone)


def _kept_flops(model: ModelConfig, sequence_length: int, devices: int) -> float:
  """Returns the operations of one token in the products of experts that a second forward pass does not repeat."""
  if model.remat != "exchange":
    return 0.0
  of = lambda kept: sum(elements for first, elements in kept.items() if devices >= first)
  total = lambda part: sum(
    repeats * 2 * of(block.kept_of_token)
    for block, repeats in matrices.of_model(resolve(part), sequence_length)
  )
  return total(model) + (model.mtp_depth * total(_of_module(model)) if model.mtp_depth else 0.0)


class StepFlops(NamedTuple):
  """Operations of one training step on all devices. A backward pass takes twice the forward pass."""

  model: float  # forward and backward: the usual reference for utilisation
  recomputed: float  # the second forward pass of the layers with remat=full, or what exchange repeats of it


def step_flops(config: Config, vocab_size: int, expert_devices: int = 1) -> StepFlops:
  """Returns the operations of one optimizer step, counting padding as text.

  Args:
    config: its `remat` says what is recomputed.
    vocab_size: V.
    expert_devices: the devices of an expert group. Where nothing is exchanged, some dispatchers keep nothing.
  """
  length = config.data.sequence_length
  flops = forward_flops(config.model, vocab_size, length)
  modules = module_flops(config.model, vocab_size, length)
  tokens = config.data.batch_size * length
  again = 0.0
  if config.model.remat in _AGAIN:
    again = flops.layers + modules.parts.layers - _kept_flops(config.model, length, expert_devices)
  return StepFlops(3 * (flops.forward + modules.forward) * tokens, again * tokens)


def expert_flops(config: Config, vocab_size: int, expert_devices: int = 1) -> float:
  """Returns the routed experts' share of `step_flops`, including recomputation."""
  arguments = config.model, vocab_size, config.data.sequence_length
  experts = forward_flops(*arguments).experts + module_flops(*arguments).parts.experts
  tokens = config.data.batch_size * config.data.sequence_length
  passes = 4 if config.model.remat in _AGAIN else 3
  return tokens * (experts * passes - _kept_flops(config.model, config.data.sequence_length, expert_devices))


def compiled_flops(program: Program) -> tuple[float, dict[str, float]]:
  """Returns the operations of all products that one device runs in a step, including loops, in total and by part.

  The einsum string of a product identifies its part: `experts`, `dispatch` (the einsum dispatcher's one-hot tensors
  that move tokens), `head`, or `other`.
  """
  total, parts = 0.0, {"experts": 0.0, "dispatch": 0.0, "head": 0.0, "other": 0.0}
  # A product inside a fusion may have lost its name. The fusion then has it.
  callers = {below: instruction for _, instruction, _ in program.executed() for below in called(instruction)}
  for computation, instruction, runs in program.executed():
    flops = runs * _product(program.computations[computation], instruction)
    if flops:
      total += flops
      parts[_part(_op_name(instruction) or _op_name(callers.get(computation)))] += flops
  return total, parts


def _op_name(instruction: Instruction | None) -> str:
  found = re.search(r'op_name="([^"]*)"', instruction.attributes) if instruction else None
  return found.group(1) if found else ""


def _part(name: str) -> str:
  marks = {"EMX,EXY->EMY": "experts", "ragged_dot": "experts", "GTEC": "dispatch", "DV->BLV": "head"}
  return next((part for mark, part in marks.items() if mark in name), "other")


def _product(computation: dict[str, Instruction], instruction: Instruction) -> float:
  opcode = instruction.opcode
  if opcode == "custom-call" and "/ragged-dot" in _op_name(instruction):
    return _ragged_kernel(computation, instruction)
  if opcode == "custom-call" and "splash_mha" in instruction.name:
    return _splash_kernel(computation, instruction)
  if opcode not in ("dot", "convolution", "ragged-dot"):
    return 0.0
  left, right = (_dimensions(computation, name) for name in instruction.operands[:2])
  out = arrays(instruction.shape)[0][1]
  if opcode == "convolution":
    return _convolution(left, right, out, instruction.attributes)
  contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
  axes = [int(axis) for axis in contracted.group(1).split(",") if axis] if contracted else []
  # In a ragged product, every row meets one matrix. If the ragged axis is summed over, `out` has the groups in front.
  groups = (
    out[0] if opcode == "ragged-dot" and "lhs_ragged_dims" in instruction.attributes and 0 in axes else 1
  )
  return 2.0 * math.prod(out) * math.prod(left[axis] for axis in axes) / groups


def _ragged_kernel(computation: dict[str, Instruction], instruction: Instruction) -> float:
  """Returns the operations of the kernel that XLA:TPU generates for a ragged product.

  Its last two operands are rows [M, X] and either matrices [E, X, Y], or rows [M, Y] whose products are summed by
  group. All M rows count, including those after the last group.
  """
  left, right = (_dimensions(computation, name) for name in instruction.operands[-2:])
  out = arrays(instruction.shape)[0][1]
  return 2.0 * math.prod(left) * (out[-1] if len(right) == 3 else right[-1])


# The products of each kernel of splash attention: how many sum over the width of queries, and of values.
_SPLASH = {"fwd": (1, 1), "dq": (2, 1), "dkv": (2, 2)}


def _splash_kernel(computation: dict[str, Instruction], instruction: Instruction) -> float:
  """Returns the operations of a kernel of splash attention, in all tiles that it does not skip.

  Its name scope has the pairs of a query and a key in these tiles, see `moe_jax.ops.attention_kernels`. Its
  first arrays in bfloat16 are queries [B, N, L, H], without B if that is 1, keys, and values.
  """
  pairs = re.search(r"splash_of_(\d+)_pairs", instruction.attributes)
  kind = re.search(r"splash_mha_([a-z]+)", instruction.name).group(1)
  operands = (arrays(computation[name].shape)[0] for name in instruction.operands)
  query, _, value = [dimensions for element, dimensions in operands if element == "bf16"][:3]
  of_queries, of_values = _SPLASH[kind]
  widths = of_queries * query[-1] + of_values * value[-1]
  return 2.0 * math.prod(query[:-2]) * int(pairs.group(1)) * widths


def _dimensions(computation: dict[str, Instruction], name: str) -> tuple[int, ...]:
  return arrays(computation[name].shape)[0][1]


def _convolution(left: tuple, right: tuple, out: tuple, attributes: str) -> float:
  """Returns the operations of a convolution.

  XLA:TPU writes every product as a convolution. Batch axes become dilated windows, most of which see only padding.
  """
  labels_left, rest = re.search(r"dim_labels=(\S+?),?(?:\s|$)", attributes).group(1).split("_")
  labels_right, labels_out = rest.rstrip(",").split("->")
  window = re.search(r"window=\{([^}]*)\}", attributes)
  fields = dict(re.findall(r"(\w+)=(\S+)", window.group(1))) if window else {}
  pairs = 1
  for i in range(sum(label.isdigit() for label in labels_out)):
    field = lambda name, default, i=i: fields[name].split("x")[i] if name in fields else default
    pairs *= _meetings(
      left[labels_left.index(str(i))],
      right[labels_right.index(str(i))],
      out[labels_out.index(str(i))],
      int(field("stride", "1")),
      int(field("pad", "0_0").split("_")[0]),
      int(field("lhs_dilate", "1")),
      int(field("rhs_dilate", "1")),
    )
  groups = re.search(r"batch_group_count=(\d+)", attributes)
  batch = left[labels_left.index("b")] / (int(groups.group(1)) if groups else 1)
  return 2.0 * batch * right[labels_right.index("i")] * right[labels_right.index("o")] * pairs


@functools.lru_cache(maxsize=4096)
def _meetings(
  size: int, window: int, out: int, stride: int, low: int, dilate: int, window_dilate: int
) -> int:
  """Counts the pairs of output and window position at an element of the input, instead of padding or a gap."""
  place = np.arange(out)[:, None] * stride - low + np.arange(window)[None, :] * window_dilate
  inside = (place >= 0) & (place <= (size - 1) * dilate) & (place % dilate == 0)
  return int(inside.sum())
