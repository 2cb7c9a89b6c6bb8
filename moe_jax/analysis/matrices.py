"""The matrices of a model that its tokens meet, counted on its blocks without making any parameter."""

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
from flax import nnx

from moe_jax.config import ModelConfig, Segment
from moe_jax.nn.block import Block
from moe_jax.nn.build import make_blocks
from moe_jax.nn.ffn import SoftMoE
from moe_jax.nn.mixers.attention import Attention
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
  attended: float  # positions that a token attends to, on average
  attention_width: (
    int  # N * H, over which the scores and the mixture of the values are summed; 0: no attention
  )


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
  num_experts = 0
  for path, shape, axes in _parameters(block.ffn):
    if axes[:1] == ("expert",) and len(axes) == 3:
      sizes["experts"] += math.prod(shape)
      num_experts = shape[0]
    elif "router" in path or "router" in axes:
      sizes["router"] += math.prod(shape) if axes[:1] == ("embed",) else 0  # others are tables, not products
    elif len(axes) == 2 and "expert" not in axes:
      sizes["shared_experts" if "shared" in path else "dense"] += math.prod(shape)
  attention = block.mixer if isinstance(block.mixer, Attention) else None
  return Matrices(
    mixer=sum(math.prod(shape) for _, shape, axes in _parameters(block.mixer) if len(axes) >= 2),
    **sizes,
    num_experts=num_experts,
    expert_rows=_expert_rows(block.ffn, sequence_length),
    attended=_attended(attention, sequence_length) if attention else 0.0,
    attention_width=math.prod(attention.w_out_NHD.get_value().shape[:2]) if attention else 0,
  )


@functools.lru_cache(maxsize=256)
def _abstract_blocks(config: ModelConfig, segment: Segment) -> list[Block]:
  found: list[Block] = []
  jax.eval_shape(lambda: found.extend(make_blocks(config, segment, nnx.Rngs(0))))
  return found


def _parameters(module: nnx.Module) -> Iterator[tuple[tuple, tuple[int, ...], tuple]]:
  """(path, shape, logical axes) of each parameter."""
  for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
    yield path, variable.get_value().shape, variable.get_metadata()["logical_axes"]


def _expert_rows(ffn: nnx.Module, sequence_length: int) -> float:
  parts = [module for _, module in nnx.iter_modules(ffn)]
  rows = sum(part.num_experts_per_token for part in parts if isinstance(part, MoE))
  slots = sum(
    math.prod(part.w_slots_DEC.get_value().shape[1:]) for part in parts if isinstance(part, SoftMoE)
  )
  return rows + slots / sequence_length


def _attended(attention: Attention, length: int) -> float:
  """With a window w the first w positions see 1, 2, .., w others; without `causal` a window reaches to either side."""
  window = min(attention.window or length, length)
  behind = (window * (window + 1) / 2 + (length - window) * window) / length
  return behind if attention.causal else 2 * behind - 1
