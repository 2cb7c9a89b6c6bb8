"""Which entries an expert keeps. This depends on which groups share its slots."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.ops.dispatch.slots import as_one_group, make_queues
from moe_jax.sharding.devices import ExpertGroup
from moe_jax.types import Array, Assignment

SCOPES = ("none", "group", "device", "global")


class Capacity(NamedTuple):
  """The slots of an expert. Groups that share slots fill them in order: all entries of the first group come first."""

  scope: str  # none: unlimited; group: one per routing group; device, global: shared by the groups of these devices
  per_group: int

  def limit(self, num_groups: int, group: ExpertGroup) -> int:
    """Returns the slots of one expert that its groups share, if each device has `num_groups` groups."""
    sharing = {"group": 1, "device": num_groups, "global": num_groups * group.size}[self.scope]
    return sharing * self.per_group

  def rows(self, entries: int, num_groups: int, num_experts: int, group: ExpertGroup) -> tuple[int, int]:
    """Returns the maximum number of rows that one device sends to another, and that it receives from all devices.

    Args:
      entries: the number of entries on one device.
      num_groups: the number of groups that these entries belong to.
      num_experts: the number of experts on one device.
      group: the devices that exchange rows.
    """
    if self.scope == "none":
      return entries, group.size * entries
    limit = num_experts * self.limit(num_groups, group)
    pair = min(entries, limit * (num_groups if self.scope == "group" else 1))
    return pair, min(group.size * pair, limit) if self.scope == "global" else group.size * pair


def kept_entries(assignment: Assignment, capacity: Capacity, num_experts: int, group: ExpertGroup) -> Array:
  """Returns kept_GA: the valid entries below the limit in their expert's queue. Fields are [G, A] of one device."""
  valid_GA = assignment.valid_A
  if capacity.scope == "none":
    return valid_GA
  holds_GA = valid_GA if assignment.holds_slot_A is None else valid_GA | assignment.holds_slot_A
  limit = capacity.limit(valid_GA.shape[0], group)
  if capacity.scope == "group":
    position = jax.vmap(lambda expert, holds: _positions(expert, holds, num_experts)[0])
    return valid_GA & (position(assignment.expert_A, holds_GA) < limit)
  one = as_one_group(assignment._replace(holds_slot_A=holds_GA), num_tokens=0)
  position_X, length_E = _positions(one.expert_A, one.holds_slot_A, num_experts)
  if capacity.scope == "global" and group.size > 1:
    length_PE = lax.all_gather(length_E, group.axis)
    earlier_P1 = (jnp.arange(group.size) < lax.axis_index(group.axis))[:, None]
    position_X += jnp.sum(jnp.where(earlier_P1, length_PE, 0), axis=0)[one.expert_A]
  return valid_GA & (position_X < limit).reshape(valid_GA.shape)


def within_budget(device_A: Array, valid_A: Array, num_devices: int, budget: int) -> Array:
  """Returns True for the first `budget` valid entries of every destination device, [A]."""
  return valid_A & (_positions(device_A, valid_A, num_devices)[0] < budget)


def _positions(expert_A: Array, holds_A: Array, num_experts: int) -> tuple[Array, Array]:
  """Returns each entry's position in its expert's queue (if it is in one), and the lengths of the queues."""
  queues = make_queues(expert_A, holds_A, num_experts)
  start_A = queues.start_E.at[queues.expert_A].get(mode="fill", fill_value=0)
  position_A = jnp.arange(expert_A.shape[0], dtype=jnp.int32) - start_A
  return jnp.zeros_like(expert_A).at[queues.entry_A].set(position_A), queues.length_E
