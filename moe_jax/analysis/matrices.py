"""The matrices of a model that its tokens meet, counted on its blocks without making any parameter."""

import functools
import math
from typing import NamedTuple

import jax
from flax import nnx

from moe_jax.analysis.positions import token_products
from moe_jax.config import ModelConfig, Segment
from moe_jax.nn.block import Block
from moe_jax.nn.build import make_blocks
from moe_jax.nn.experts.quantised import quantised_size
from moe_jax.nn.ffn import SoftMoE
from moe_jax.nn.moe import MoE
from moe_jax.nn.variables import matrix_sizes


class Matrices(NamedTuple):
  """Elements of the matrices that the tokens of one block are multiplied by, by part of the block."""

  mixer: int
  router: int
  experts: int  # of all routed experts together
  experts_of_token: float  # of the K of E that work on a token; on average over a sequence
  shared_experts: int
  dense: int  # feed-forward parts without experts, and those beside experts
  # Of `experts_of_token`, those whose products are what experts return, by the devices of an expert group from which on
  # --remat=exchange keeps these.
  kept_of_token: dict[float, float]
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
  """Counts one block, whose parameters may be abstract.

  Routed experts outside of a layer that says how many a token gets all work on it.
  """
  sizes = dict.fromkeys(("experts", "shared_experts", "dense"), 0)
  for path, size, axes in matrix_sizes(block.ffn):
    if not _of_router(path, axes):
      sizes[_kind(path, axes)] += size
  sizes["experts"] += quantised_size(block.ffn)
  layers = [part for _, part in nnx.iter_modules(block.ffn) if isinstance(part, MoE | SoftMoE)]
  of_token = [_share_of_token(layer, sequence_length) for layer in layers]
  elsewhere = sizes["experts"] - sum(map(_expert_size, layers))
  return Matrices(
    mixer=sum(size for _, size, _ in matrix_sizes(block.mixer)),
    router=_multiplied(block.ffn),
    **sizes,
    experts_of_token=elsewhere + sum(elements for elements, _ in of_token),
    kept_of_token=_kept(layers, sequence_length),
    expert_rows=sum(rows for _, rows in of_token),
    positions=token_products(block.mixer, sequence_length),
    positions_decoding=token_products(block.mixer, sequence_length, decoding=True),
  )


def _kind(path: tuple, axes: tuple[str, ...]) -> str:
  if "expert" in axes:
    return "experts"
  return "shared_experts" if "shared" in path else "dense"


def _of_router(path: tuple, axes: tuple[str, ...]) -> bool:
  return "router" in path or "router" in axes


def _multiplied(ffn: nnx.Module) -> int:
  """Returns the elements of the matrices among the parameters of routers that a token or its products are multiplied by.

  The rows of such a matrix are the token, or what another of them makes, or the experts if it is stored as [E, D]. The
  rows of a table are looked up instead. Some vectors are multiplied by as a matrix is.
  """
  matrices = [
    (math.prod(variable.get_value().shape), axes)
    for path, variable in nnx.to_flat_state(nnx.state(ffn, nnx.Param))
    for axes in [variable.get_metadata()["logical_axes"]]
    if _of_router(path, axes) and len(axes) > 1
  ]
  made, before = {"embed"}, set()
  is_met = lambda axes: axes[0] in made or (axes[0] in ("router", "expert") and not made.isdisjoint(axes[1:]))
  while made != before:
    before = made
    made = made.union(*(axes for _, axes in matrices if is_met(axes)))
  return sum(size for size, axes in matrices if is_met(axes))


@functools.lru_cache(maxsize=256)
def _abstract_blocks(config: ModelConfig, segment: Segment) -> list[Block]:
  found: list[Block] = []
  jax.eval_shape(lambda: found.extend(make_blocks(config, segment, nnx.Rngs(0))))
  return found


def _expert_size(layer: MoE | SoftMoE) -> int:
  """Returns the elements of the matrices of all experts of one layer."""
  kept = (size for path, size, axes in matrix_sizes(layer.experts) if not _of_router(path, axes))
  return sum(kept) + quantised_size(layer.experts)


def _kept(layers: list[MoE | SoftMoE], sequence_length: int) -> dict[float, float]:
  found: dict[float, float] = {}
  for layer in layers:
    _, rows = _share_of_token(layer, sequence_length)
    sizes = matrix_sizes(layer.experts)
    out = sum(size for path, size, axes in sizes if axes[-1] == "embed" and "adapters" not in path)
    out += quantised_size(layer.experts, to="embed")
    first = layer.dispatcher.marks_from if isinstance(layer, MoE) else 1  # Soft MoE has buffers as `sorted`
    found[first] = found.get(first, 0.0) + rows * out / _num_experts(layer)
  return found


def _num_experts(layer: MoE | SoftMoE) -> int:
  return layer.num_experts if isinstance(layer, MoE) else layer.w_slots_DEC.get_value().shape[1]


def _share_of_token(layer: MoE | SoftMoE, sequence_length: int) -> tuple[float, float]:
  """Returns the elements of the experts' matrices that a token is multiplied by, and the rows that experts work on for it."""
  num_experts = _num_experts(layer)
  if isinstance(layer, MoE):
    rows = layer.num_experts_per_token
  else:
    rows = num_experts * layer.w_slots_DEC.get_value().shape[-1] / sequence_length
  return rows * _expert_size(layer) / num_experts, rows
