"""One program per device: its part of tokens, assignments and experts, and what is made of its results."""

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
  """The devices that hold all experts between them. `axis` is None without a mesh."""

  axis: str | None
  size: int


# (x_GTD, assignment, experts, group) -> (y_GTD, kept_GA), each the part of one device.
OnDevice = Callable[[Array, Assignment, Experts, ExpertGroup], tuple[Array, Array]]


def on_each_device(
  function: OnDevice, x_GTD: Array, assignment: Assignment, experts: Experts
) -> tuple[Array, Array]:
  """`function` on the part of every device of the mesh in use, by `jax.shard_map`.

  Groups are split over the axes of the batch, experts over theirs. Parameters kept in parts (fsdp) are
  gathered here, so that their gradients are reduced and scattered in one step. Where the experts' hidden
  width is split (tensor), each device returns a part of the sum, which is added up outside.

  Raises:
    InputError: the mesh does not divide the groups or the experts.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return function(x_GTD, assignment, experts, ExpertGroup(None, 1))
  (expert_axis,), (hidden_axis,) = sharding.RULES["expert"], sharding.RULES["mlp"]
  _check(mesh, x_GTD.shape[0], experts.num_experts, expert_axis)
  group = ExpertGroup(expert_axis, mesh.shape[expert_axis])
  parts = mesh.shape[hidden_axis]  # of the sum that a row's output is

  by_group = sharding.partition_spec(("group",))
  weight_specs = tuple(sharding.partition_spec(axes) for axes in experts.axes)
  fields, fields_tree = jax.tree.flatten(assignment)

  def part_of_sum(weights: tuple[Array, ...], rows: Array, product: Product) -> Array:
    return experts.compute(weights, rows, PartOfSum(product, parts))

  def body(x_GTD, fields, weights):
    weights = tuple(_whole(w, spec) for w, spec in zip(weights, weight_specs, strict=True))
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


def _whole(w: Array, spec: PartitionSpec) -> Array:
  """One device's part of a matrix, with the dimension that is only kept in parts gathered."""
  kept_in_parts = {axis for name in sharding.KEPT_IN_PARTS for axis in sharding.RULES[name]}
  for dimension, axis in enumerate(spec):
    if axis in kept_in_parts and lax.axis_size(axis) > 1:
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
