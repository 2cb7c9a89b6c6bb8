"""Finds the collectives of a compiled program, by kind and mesh axes, with counts and bytes."""

import collections
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from moe_jax.analysis.hlo import Instruction, Program, num_bytes

KINDS = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)

# (kinds, mesh axes, why the layouts of `moe_jax.sharding.RULES` need it). A subset of the axes also matches.
_PURPOSES = (
  (("all-to-all", "ragged-all-to-all"), {"expert"}, "rows to their experts and back"),
  (("all-gather",), {"fsdp", "expert"}, "parameters, where they are used"),
  (("reduce-scatter",), {"fsdp", "expert"}, "gradients of parameters that are kept in parts"),
  (("all-reduce",), {"tensor"}, "sums over heads, hidden widths and vocabulary"),
  (
    ("all-reduce",),
    {"slice", "data", "fsdp", "expert", "tensor"},
    "gradients of what is whole, statistics, the loss",
  ),
)
# Only for dispatchers that write out the exchange.
_SPELLED = (
  (("all-gather",), {"expert"}, "rows per expert, or the tokens themselves"),
  (("reduce-scatter",), {"expert"}, "sums of the experts' results, back to their tokens"),
)


def purpose(kind: str, axes: Sequence[str], spells_exchange: bool = False) -> str:
  """Returns the purpose of a collective, or an empty string if no rule explains it.

  Args:
    kind, axes: from a row of `by_kind`.
    spells_exchange: a property of the dispatcher, see `moe_jax.sharding.dispatchers.Dispatcher`.
  """
  for kinds, known, what in _PURPOSES + (_SPELLED if spells_exchange else ()):
    of_parameters = known == {"fsdp", "expert"}  # which no mesh keeps in parts over `expert` alone
    if kind in kinds and set(axes) <= known and ("fsdp" in axes or not of_parameters):
      return what
  return ""


class Collective(NamedTuple):
  """One collective instruction of a program, which a step runs `count` times."""

  name: str
  kind: str
  axes: tuple[str, ...]  # the mesh axes along which it exchanges; ("?",): not a product of axes
  group_size: int  # devices that take part together
  count: int  # runs per step
  buffer_bytes: int  # on one device, per run: what is gathered, reduced, or exchanged
  sent_bytes: int  # that one device sends to others, per run; see `sent`
  op_name: str  # where in the program it comes from


def sent(kind: str, buffer_bytes: int, group_size: int) -> int:
  """Returns the minimum number of bytes of a buffer of `b` bytes that a device sends to `n - 1` others.

  all-gather, reduce-scatter, all-to-all: b (n-1)/n, where b is the gathered, the whole, or the exchanged buffer.
  all-reduce: twice that (a reduce-scatter and an all-gather). collective-permute: b. ragged-all-to-all: its buffer has
  room for the worst case, so this is an upper bound.
  """
  if kind.startswith("collective-"):
    return buffer_bytes if group_size > 1 else 0
  times = 2 if kind == "all-reduce" else 1
  return times * buffer_bytes * (group_size - 1) // group_size


def collectives(program: Program, mesh_shape: Mapping[str, int]) -> list[Collective]:
  """Returns all collectives that a step runs.

  Args:
    program: see `hlo.parse`.
    mesh_shape: the size of each mesh axis, in the order of the mesh; a device's number is its position in the mesh.
  """
  scattered = _reduce_scatter_computations(program)
  found = []
  for computation, instruction, count in program.executed():
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
      continue
    members = _members(instruction, mesh_shape)
    buffer_bytes = _buffer(program.computations[computation], instruction, kind)
    # XLA:TPU implements a reduce-scatter as a fusion of an all-reduce and the slice that a device keeps.
    kind = "reduce-scatter" if computation in scattered and kind == "all-reduce" else kind
    size = len(members[0])
    op_name = re.search(r'op_name="([^"]*)"', instruction.attributes)
    found.append(
      Collective(
        name=instruction.name,
        kind=kind,
        axes=varying_axes(members, mesh_shape),
        group_size=size,
        count=count,
        buffer_bytes=buffer_bytes,
        sent_bytes=sent(kind, buffer_bytes, size),
        op_name=op_name.group(1) if op_name else "",
      )
    )
  return found


def by_kind(found: list[Collective]) -> list[dict]:
  """Returns one row per kind and axes with count and bytes per step, most bytes first. Groups of one are left out."""
  rows = collections.defaultdict(lambda: {"count": 0, "buffer_bytes": 0, "sent_bytes": 0})
  for one in found:
    if one.group_size > 1:
      row = rows[one.kind, one.axes]
      row["count"] += one.count
      row["buffer_bytes"] += one.count * one.buffer_bytes
      row["sent_bytes"] += one.count * one.sent_bytes
  table = [{"kind": kind, "axes": list(axes), **row} for (kind, axes), row in rows.items()]
  return sorted(table, key=lambda row: -row["sent_bytes"])


def _reduce_scatter_computations(program: Program) -> set[str]:
  return {name for name in program.computations if name.startswith("all-reduce-scatter")}


def _buffer(computation: dict[str, Instruction], instruction: Instruction, kind: str) -> int:
  """Returns the bytes of the larger of input and output. The result of a start repeats its operand and is ignored."""
  operands = [computation[name] for name in instruction.operands if name in computation]
  if kind == "ragged-all-to-all":
    operands = operands[:1]
  into = sum(num_bytes(operand.shape) for operand in operands)
  if kind == "all-gather":
    whole = num_bytes(instruction.shape)
    return whole - into if instruction.opcode.endswith("-start") else whole
  return into


def _members(instruction: Instruction, mesh_shape: Mapping[str, int]) -> np.ndarray:
  """Returns the numbers of the devices that take part together, [groups, members]."""
  text, everyone = instruction.attributes, math.prod(mesh_shape.values())
  pairs = re.search(r"source_target_pairs=\{(\{[\d,{} ]*\})\}", text)
  if pairs:
    found = [[int(n) for n in pair.split(",")] for pair in re.findall(r"\{(\d+,\d+)\}", pairs.group(1))]
    return np.array([pair for pair in found if pair[0] != pair[1]] or [[0]])
  mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\S+)\))? \{([^}]*)\}", text)
  if mesh:
    return _groups_of_mesh(*mesh.groups())
  iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
  if iota:
    shape, sizes, order = (tuple(map(int, part.split(","))) if part else None for part in iota.groups())
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return (ids if order is None else ids.transpose(order)).reshape(shape)
  listed = re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", text)
  if listed:
    return np.array(
      [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d, ]+)\}", listed.group(1))]
    )
  return np.arange(everyone)[None]  # no groups are written: all devices


def _groups_of_mesh(sizes: str, devices: str | None, axes: str) -> np.ndarray:
  """Parses the form mesh['data'=2,'expert'=4] {'expert'}.

  An axis may be partial, as in 'expert':(2)2, and the devices may be in another order, as in
  device_ids=([2,4]T(1,0)) or (0,2,1,3).
  """
  shape = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", sizes)}
  chosen = {
    name: (int(before or 1), int(size or shape[name]))
    for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", axes)
  }
  split, members = [], []
  for name, size in shape.items():
    before, own = chosen.get(name, (size, 1))
    members += [len(split) + 1] if name in chosen else []
    split += [before, own, size // (before * own)]
  ids = _device_order(devices, math.prod(split)).reshape(split)
  others = [i for i in range(len(split)) if i not in members]
  return ids.transpose([*others, *members]).reshape(-1, math.prod(split[i] for i in members))


def _device_order(devices: str | None, number: int) -> np.ndarray:
  if devices is None:
    return np.arange(number)
  numbers = lambda text: [int(n) for n in text.split(",")]
  transposed = re.fullmatch(r"\[([\d,]+)\]T\(([\d,]+)\)", devices)
  if transposed:
    return np.arange(number).reshape(numbers(transposed.group(1))).transpose(numbers(transposed.group(2)))
  return np.array(numbers(devices))


def varying_axes(members: np.ndarray, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
  """Returns the mesh axes along which members of a group differ, or ("?",) if they are not all devices along these.

  The members of a permute are its senders and receivers, so a single pair may be only part of an axis.
  """
  sizes = tuple(mesh_shape.values())
  if members.shape[1] == 1:
    return ()
  if members.max() >= math.prod(sizes):
    return ("?",)
  places = np.stack(np.unravel_index(members, sizes), axis=-1)
  varies = (places != places[:, :1]).any(axis=(0, 1))
  axes = tuple(name for name, moves in zip(mesh_shape, varies) if moves)
  whole = math.prod(mesh_shape[name] for name in axes) == members.shape[1]
  pairwise = members.shape[1] == 2
  return axes if whole or pairwise else ("?",)
