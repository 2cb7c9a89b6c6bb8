"""Assigns slots to entries: the integer bookkeeping that dispatchers share. Nothing here is differentiable."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.types import Array, Assignment


class Queues(NamedTuple):
  """The entries of one group, sorted by expert. Entries that hold no slot come last and are in no queue."""

  entry_A: Array  # int32, the entries in queue order: all of expert 0, then all of expert 1, ...
  expert_A: Array  # int32, expert of each of those, E for entries in no queue
  start_E: Array  # int32, where each expert's queue begins
  length_E: Array  # int32


class Slots(NamedTuple):
  """The slots of one group's experts. `T` and `A` mark an empty slot, `E*C` marks no slot."""

  token_EC: Array  # int32, in [0, T]: the token in each slot
  entry_EC: Array  # int32, in [0, A]: the entry in each slot
  kept_A: Array  # bool: valid and within capacity


def make_queues(expert_A: Array, holds_slot_A: Array, num_experts: int) -> Queues:
  """Sorts the entries by expert. The sort is stable, because the order within a queue is the priority."""
  expert_A = jnp.where(holds_slot_A, expert_A, num_experts)
  num_entries = expert_A.shape[0]
  index_A = jnp.arange(num_entries, dtype=jnp.int32)
  if (num_experts + 1) * num_entries < 2**31:
    # Sorting one packed key is 3x faster than sorting key and value (XLA:CPU), and stable because keys are unique.
    packed_A = jnp.sort(expert_A * num_entries + index_A, stable=False)
    expert_A, entry_A = packed_A // num_entries, packed_A % num_entries
  else:
    expert_A, entry_A = jax.lax.sort((expert_A, index_A), num_keys=1, is_stable=True)
  bounds = jnp.searchsorted(expert_A, jnp.arange(num_experts + 1, dtype=jnp.int32)).astype(jnp.int32)
  return Queues(entry_A, expert_A, bounds[:-1], bounds[1:] - bounds[:-1])


def as_one_group(assignment: Assignment, num_tokens: int) -> Assignment:
  """Concatenates the lists of all groups, fields [G, A], into one list [G * A] over their G * T tokens."""
  offset_G1 = num_tokens * jnp.arange(assignment.token_A.shape[0], dtype=jnp.int32)[:, None]
  numbered_through = assignment._replace(token_A=assignment.token_A + offset_G1)
  return jax.tree.map(lambda field: field.reshape(-1), numbered_through)


def in_queue_order(
  assignment: Assignment, queues: Queues, num_experts: int, num_tokens: int
) -> tuple[Array, Array]:
  """Returns token and combine weight of every entry, sorted by expert; `num_tokens` and 0 for those in no queue."""
  in_queue_A = queues.expert_A < num_experts
  token_A = jnp.where(in_queue_A, assignment.token_A[queues.entry_A], num_tokens)
  return token_A, jnp.where(in_queue_A, assignment.weight_A[queues.entry_A], 0)


def assign_slots(assignment: Assignment, num_tokens: int, num_experts: int, capacity: int) -> Slots:
  """Assigns a slot to each of the first `capacity` entries of every expert's queue. The other entries drop.

  An entry's slot is the number of earlier entries of its expert that hold a slot. A valid entry always holds a
  slot, regardless of `holds_slot_A`.
  """
  valid_A = assignment.valid_A
  holds_slot_A = valid_A if assignment.holds_slot_A is None else valid_A | assignment.holds_slot_A
  queues = make_queues(assignment.expert_A, holds_slot_A, num_experts)
  num_entries = valid_A.shape[0]

  slot_1C = jnp.arange(capacity, dtype=jnp.int32)[None]
  sorted_EC = queues.start_E[:, None] + slot_1C
  entry_EC = queues.entry_A.at[sorted_EC].get(mode="fill", fill_value=num_entries)
  filled_EC = (slot_1C < queues.length_E[:, None]) & valid_A.at[entry_EC].get(mode="fill", fill_value=False)
  entry_EC = jnp.where(filled_EC, entry_EC, num_entries)
  token_EC = assignment.token_A.at[entry_EC].get(mode="fill", fill_value=num_tokens)
  kept_A = jnp.zeros(num_entries, bool).at[entry_EC].set(True, mode="drop")
  return Slots(token_EC, entry_EC, kept_A)
