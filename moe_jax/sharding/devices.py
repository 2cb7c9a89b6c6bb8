"""Runs a function on each device's part of the tokens, assignments and experts, and combines the results."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import lax
from jax.sharding import PartitionSpec

from moe_jax import sharding
from moe_jax.errors import InputError
from moe_jax.ops.experts import Experts, PartOfSum, Product
from moe_jax.types import Array, Assignment


class ExpertGroup(NamedTuple):
  """The devices that together hold all experts. `axis` is None without a mesh."""

  axis: str | None
  size: int


# (x_GTD, assignment, experts, group) -> (y_GTD, kept_GA), each the part of one device.
OnDevice = Callable[[Array, Assignment, Experts, ExpertGroup], tuple[Array, Array]]


def on_each_device(
  function: OnDevice, x_GTD: Array, assignment: Assignment, experts: Experts
) -> tuple[Array, Array]:
  """Runs `function` on every device of the mesh in use, each with its own part, using `jax.shard_map`.

  Groups are split over the batch axes, and experts over the expert axis. Parameters that are sharded over fsdp are
  gathered here, so that their gradients come back with one reduce-scatter. If the experts' hidden width is split
  (tensor), each device returns a partial sum, and the partial sums are added outside.

  Raises:
    InputError: if the mesh does not divide the number of groups or experts.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return function(x_GTD, assignment, experts, ExpertGroup(None, 1))
  (expert_axis,), (hidden_axis,) = sharding.RULES["expert"], sharding.RULES["mlp"]
  _check(mesh, x_GTD.shape[0], experts.num_experts, expert_axis)
  group = ExpertGroup(expert_axis, mesh.shape[expert_axis])
  parts = mesh.shape[hidden_axis]  # partial sums per row

  by_group = sharding.partition_spec(("group",))
  weight_specs = tuple(sharding.partition_spec(axes) for axes in experts.axes)
  fields, fields_tree = jax.tree.flatten(assignment)

  def part_of_sum(weights: tuple[Array, ...], rows: Array, product: Product) -> Array:
    return experts.compute(weights, rows, PartOfSum(product, parts))

  def body(x_GTD, fields, weights):
    weights = tuple(map(_whole, weights, experts.axes, weight_specs))
    here = Experts(weights, experts.axes, experts.compute if parts == 1 else part_of_sum)
    y_GTD, kept_GA = function(x_GTD, jax.tree.unflatten(fields_tree, fields), here, group)
    return (y_GTD if parts == 1 else y_GTD[None]), kept_GA

  y, kept_GA = jax.shard_map(
    body,
    in_specs=(by_group, by_group, weight_specs),
    out_specs=(by_group if parts == 1 else PartitionSpec(hidden_axis, *by_group), by_group),
    check_vma=False,
  )(x_GTD, fields, experts.weights)
  return (y if parts == 1 else y.sum(axis=0)), kept_GA


def _whole(w: Array, logical_axes: tuple[str | None, ...], spec: PartitionSpec) -> Array:
  """Returns one device's part of a matrix, gathered along the dimension that is sharded only for storage."""
  for dimension, (name, axis) in enumerate(zip(logical_axes, spec)):
    if name in sharding.KEPT_IN_PARTS and axis is not None and lax.axis_size(axis) > 1:
      w = lax.all_gather(w, axis, axis=dimension, tiled=True)
  return w


def _check(mesh, num_groups: int, num_experts: int, expert_axis: str) -> None:
  parts = math.prod(mesh.shape[axis] for axis in sharding.RULES["group"])
  if num_groups % parts:
    raise InputError(f"{num_groups} routing groups: the {parts} devices that hold groups do not divide them")
  if num_experts % mesh.shape[expert_axis]:
    raise InputError(
      f"--num_experts={num_experts}: must be a multiple of --expert_parallelism={mesh.shape[expert_axis]}"
    )
