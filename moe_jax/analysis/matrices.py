"""The matrices of a model that its tokens meet, counted on its blocks without making any parameter."""

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
from flax import nnx

from moe_jax.analysis.positions import token_products
from moe_jax.config import ModelConfig, Segment
from moe_jax.nn.block import Block
from moe_jax.nn.build import make_blocks
from moe_jax.nn.experts.quantised import QuantisedExperts
from moe_jax.nn.ffn import SoftMoE
from moe_jax.nn.moe import MoE


class Matrices(NamedTuple):
  """Elements of the matrices that the tokens of one block are multiplied by, by part of the block."""

  mixer: int
  router: int
  experts: int  # of all E experts together
  shared_experts: int
  dense: int  # feed-forward parts without experts, and those beside experts
  num_experts: int  # E; 0: there are none
  expert_rows: float  # rows that experts work on per token of a sequence: K
  positions: float  # multiplications of a token with other positions, on average over a sequence
  positions_decoding: float  # those of the last token of a sequence, behind a cache


def of_model(config: ModelConfig, sequence_length: int) -> list[tuple[Matrices, int]]:
  """(matrices, number of such blocks) for each block of each segment's pattern.

  Args:
    config: resolved, see `moe_jax.nn.build.resolve`.
    sequence_length: L.
  """
  return [
    (of_block(block, sequence_length), segment.repeats)
    for segment in config.blocks
    for block in _abstract_blocks(config, segment)
  ]


def of_block(block: Block, sequence_length: int) -> Matrices:
  """Counts one block, whose parameters may be abstract."""
  sizes = dict.fromkeys(("router", "experts", "shared_experts", "dense"), 0)
  num_experts, of_router = 0, []
  for path, shape, axes, _ in _parameters(block.ffn):
    if axes[:1] == ("expert",) and len(axes) == 3:
      sizes["experts"] += math.prod(shape)
      num_experts = shape[0]
    elif "router" in path or "router" in axes:
      of_router.append((shape, axes))
    elif len(axes) == 2 and "expert" not in axes:
      sizes["shared_experts" if "shared" in path else "dense"] += math.prod(shape)
  sizes["router"] = _multiplied(of_router)
  for number, rows, columns in quantised_matrices(block.ffn):
    sizes["experts"] += number * rows * columns
    num_experts = number
  return Matrices(
    mixer=sum(math.prod(shape) for _, shape, _, is_matrix in _parameters(block.mixer) if is_matrix),
    **sizes,
    num_experts=num_experts,
    expert_rows=_expert_rows(block.ffn, sequence_length),
    positions=token_products(block.mixer, sequence_length),
    positions_decoding=token_products(block.mixer, sequence_length, decoding=True),
  )


def _multiplied(parameters: list[tuple[tuple[int, ...], tuple]]) -> int:
  """Returns the elements of the matrices among (shape, logical axes) that a token or its products are multiplied by.

  The rows of such a matrix are the token, or what another of them makes. The rows of a table are looked up instead.
  """
  matrices = [(math.prod(shape), axes) for shape, axes in parameters if len(axes) > 1]
  made, before = {"embed"}, set()
  while made != before:
    before = made
    made = made.union(*(axes[1:] for _, axes in matrices if axes[0] in made))
  return sum(size for size, axes in matrices if axes[0] in made)


def quantised_matrices(module: nnx.Module) -> list[tuple[int, int, int]]:
  """(number, inputs, outputs) of the matrices that quantised experts keep as codes, which are no parameters."""
  return [
    (math.prod(codes.shape[:-2]), rows, codes.shape[-1])
    for _, experts in nnx.iter_modules(module)
    if isinstance(experts, QuantisedExperts)
    for name, rows, _ in experts.sizes
    for codes in [experts.codes[name].get_value()]
  ]


@functools.lru_cache(maxsize=256)
def _abstract_blocks(config: ModelConfig, segment: Segment) -> list[Block]:
  found: list[Block] = []
  jax.eval_shape(lambda: found.extend(make_blocks(config, segment, nnx.Rngs(0))))
  return found


def _parameters(module: nnx.Module) -> Iterator[tuple[tuple, tuple[int, ...], tuple, bool]]:
  """(path, shape, logical axes, whether `matrix` made it) of each parameter."""
  for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
    metadata = variable.get_metadata()
    yield path, variable.get_value().shape, metadata["logical_axes"], "num_in" in metadata


def _expert_rows(ffn: nnx.Module, sequence_length: int) -> float:
  parts = [module for _, module in nnx.iter_modules(ffn)]
  rows = sum(part.num_experts_per_token for part in parts if isinstance(part, MoE))
  slots = sum(
    math.prod(part.w_slots_DEC.get_value().shape[1:]) for part in parts if isinstance(part, SoftMoE)
  )
  return rows + slots / sequence_length
