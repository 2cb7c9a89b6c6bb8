"""Finds meshes worth compiling for: those that divide the model, sorted by an estimate of the bytes they send."""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax

from moe_jax import sharding
from moe_jax.analysis import matrices
from moe_jax.config import Config, MeshConfig
from moe_jax.nn.build import resolve
from moe_jax.training.compiled import make_init, resolve_config

_WIRE = 2  # bytes per element sent: parameters and activations are cast to bfloat16 first


class Estimate(NamedTuple):
  """The estimated cost of one mesh, per device."""

  mesh: MeshConfig
  state_bytes: int  # parameters, optimizer and balancer state: exact
  sent_bytes: float  # per step, see `sent_bytes`


def all_meshes(num_devices: int, num_slices: int = 1) -> Iterator[MeshConfig]:
  """Yields every factorisation of the devices of a slice into data x fsdp x expert x tensor."""
  inside = num_devices // num_slices
  divisors = [n for n in range(1, inside + 1) if inside % n == 0]
  for fsdp, expert, tensor in itertools.product(divisors, repeat=3):
    if inside % (fsdp * expert * tensor) == 0:
      data = inside // (fsdp * expert * tensor)
      yield MeshConfig(slice=num_slices, data=data, fsdp=fsdp, expert=expert, tensor=tensor)


def state_bytes(config: Config, vocab_size: int, mesh) -> int:
  """Returns the bytes of parameters, optimizer and balancer state on one device. `mesh` may be an `AbstractMesh`."""
  state = jax.eval_shape(make_init(resolve_config(config), vocab_size), 0)
  layout = sharding.state_shardings(mesh, state)
  of_leaf = lambda leaf, where: math.prod(where.shard_shape(leaf.shape)) * leaf.dtype.itemsize
  return sum(jax.tree.leaves(jax.tree.map(of_leaf, state, layout)))


def sent_bytes(config: Config, mesh: MeshConfig) -> float:
  """Estimates the bytes that a device sends in a step, accurately enough to sort meshes but not to report.

  fsdp: parameters are gathered in the forward and the backward pass, and gradients are scattered. expert: rows are sent
  to their experts and back, see `ahead_of_time.exchange`. slice and data: gradients are summed. tensor: activations are
  summed after attention and after the feed-forward block, in the forward, recomputed and backward passes.
  """
  model = resolve(config.model)
  blocks = matrices.of_model(model, config.data.sequence_length)
  total = lambda size: sum(repeats * size(block) for block, repeats in blocks)
  experts = total(lambda block: block.experts) / mesh.expert
  others = total(lambda block: block.mixer + block.shared_experts + block.dense)
  parameters = (experts + others) / mesh.tensor
  d, layers = model.model_dim, total(lambda block: 1)
  left = lambda n: (n - 1) / n
  tokens = config.data.batch_size * config.data.sequence_length
  tokens /= mesh.slice * mesh.data * mesh.fsdp * mesh.expert
  passes = 6 if model.remat == "full" else 4
  rows = tokens * d * total(lambda block: block.expert_rows)
  sent = 3 * parameters * left(mesh.fsdp)
  sent += passes * rows * left(mesh.expert)
  sent += 2 * parameters / mesh.fsdp * left(mesh.slice * mesh.data)
  sent += 2 * passes * tokens * d * layers * left(mesh.tensor)
  return _WIRE * sent


def estimates(config: Config, vocab_size: int, meshes: list[tuple[MeshConfig, object]]) -> list[Estimate]:
  """Returns the estimate for each (mesh, `AbstractMesh` of it), fewest bytes sent first."""
  found = [
    Estimate(mesh, state_bytes(config, vocab_size, abstract), sent_bytes(config, mesh))
    for mesh, abstract in meshes
  ]
  return sorted(found, key=lambda one: (one.sent_bytes, one.state_bytes))
