"""Compiled programs as text: instructions, and how often each one runs.

XLA's own cost analysis counts the body of a loop once, however often it runs; a model that scans over its layers
is nearly all loop body. Here every computation has the number of times that one step runs it.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128, "bf16": 16}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")


class Instruction(NamedTuple):
  """One line of a computation."""

  name: str
  shape: str  # with layouts; of a tuple in parentheses
  opcode: str
  operands: tuple[str, ...]  # names
  arguments: str  # what is between the parentheses
  attributes: str  # what follows them
  is_root: bool


class Program(NamedTuple):
  """A module. `runs` says how often one step runs each computation that it reaches."""

  computations: dict[str, dict[str, Instruction]]
  runs: dict[str, int]
  unknown_loops: tuple[str, ...]  # loops whose number of iterations depends on data; counted as one

  def executed(self) -> Iterator[tuple[str, Instruction, int]]:
    """(computation, instruction, runs) of all instructions that run at all."""
    for computation, runs in self.runs.items():
      for instruction in self.computations[computation].values():
        yield computation, instruction, runs


def arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
  """(element type, dimensions) of each array in a shape, tuples flattened.

  >>> arrays("(bf16[2,4]{1,0:T(8,128)}, u32[])")
  [('bf16', (2, 4)), ('u32', ())]
  """
  return [
    (kind, tuple(int(size) for size in sizes.split(",") if size)) for kind, sizes in _ARRAY.findall(shape)
  ]


def num_bytes(shape: str) -> int:
  """Bytes of all arrays in a shape, without padding."""
  return sum(math.prod(sizes) * _bits(kind) for kind, sizes in arrays(shape)) // 8


def _bits(kind: str) -> int:
  if kind in _BITS:
    return _BITS[kind]
  found = re.match(r"[a-z]+(\d+)", kind)
  return int(found.group(1)) if found else 0


def parse(text: str) -> Program:
  """Reads `compiled.as_text()`."""
  computations, entry, current = {}, "", {}
  for line in text.splitlines():
    if line and not line[0].isspace() and line.endswith("{") and not line.startswith("HloModule"):
      name = line.removeprefix("ENTRY ").split(" ", 1)[0].split("(", 1)[0].lstrip("%")
      entry = name if line.startswith("ENTRY") else entry
      current = computations.setdefault(name, {})
    elif " = " in line and line[:1].isspace():
      instruction = _instruction(line)
      current[instruction.name] = instruction
  runs, unknown = _count_runs(computations, entry)
  return Program(computations, runs, unknown)


def _instruction(line: str) -> Instruction:
  left, right = line.strip().split(" = ", 1)
  end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
  shape, rest = right[:end], right[end:].lstrip()
  opening = rest.index("(")
  closing = _closing(rest, opening)
  arguments = rest[opening + 1 : closing]
  return Instruction(
    name=left.removeprefix("ROOT ").lstrip("%"),
    shape=shape,
    opcode=rest[:opening],
    operands=tuple(_NAME.findall(arguments)),
    arguments=arguments,
    attributes=rest[closing + 1 :],
    is_root=left.startswith("ROOT "),
  )


def _closing(text: str, opening: int) -> int:
  """Where the parenthesis that opens at `opening` closes."""
  depth = 0
  for match in re.compile(r"[()]").finditer(text, opening):
    depth += 1 if match.group() == "(" else -1
    if depth == 0:
      return match.start()
  raise ValueError(f"no closing parenthesis: {text[:80]}")


def called(instruction: Instruction) -> list[str]:
  """The computations that an instruction runs each time, the condition of a loop included. The second halves of
  asynchronous pairs run nothing, and neither counts what reductions and sorts do to single numbers."""
  if instruction.opcode.endswith(("-done", "-update")):
    return []
  keys = "calls|called_computations|body|condition|branch_computations|true_computation|false_computation"
  if instruction.opcode.startswith("call"):
    keys += "|to_apply"
  found = re.findall(rf"\b(?:{keys})=(\{{[^}}]*\}}|%[\w.\-]+)", instruction.attributes)
  return [name for part in found for name in _NAME.findall(part)]


def _count_runs(computations: dict, entry: str) -> tuple[dict[str, int], tuple[str, ...]]:
  """Every branch of a conditional counts as if it were taken."""
  order, seen = [], set()

  def visit(name):
    seen.add(name)
    for instruction in computations[name].values():
      for below in called(instruction):
        if below in computations and below not in seen:
          visit(below)
    order.append(name)

  visit(entry)
  runs, unknown = dict.fromkeys(reversed(order), 0), []
  runs[entry] = 1
  for name in reversed(order):
    for instruction in computations[name].values():
      times = 1
      if instruction.opcode == "while":
        times = trip_count(computations, name, instruction)
        if times is None:
          unknown.append(instruction.name)
      for below in called(instruction):
        if below in runs:
          runs[below] += runs[name] * (1 if times is None else times)
  return runs, tuple(unknown)


def trip_count(computations: dict, name: str, loop: Instruction) -> int | None:
  """How often a loop's body runs; None where that depends on data.

  Compilers for CPU and GPU write it down; the one for TPU does not, and there it is read off a condition that compares
  one number of the loop's state, which starts at a constant and counts up by one, with another constant.
  """
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
  if known:
    return int(known.group(1))
  condition = computations.get(re.search(r"condition=%([\w.\-]+)", loop.attributes).group(1), {})
  comparisons = [i for i in condition.values() if i.opcode == "compare" and "direction=LT" in i.attributes]
  if len(comparisons) != 1 or len(comparisons[0].operands) != 2:
    return None
  counter, limit = (condition.get(operand) for operand in comparisons[0].operands)
  index = re.search(r"index=(\d+)", counter.attributes) if counter else None
  end = _constant(limit)
  if index is None or end is None:
    return None
  start = _initial(computations[name], loop, int(index.group(1)))
  return None if start is None else max(end - start, 0)


def _initial(computation: dict, loop: Instruction, index: int) -> int | None:
  """The constant that an element of the loop's state starts with."""
  state = computation.get(loop.operands[0]) if loop.operands else None
  if state is None or state.opcode != "tuple" or index >= len(state.operands):
    return None
  value = computation.get(state.operands[index])
  while value is not None and value.opcode in ("copy", "bitcast", "convert"):
    value = computation.get(value.operands[0])
  return _constant(value)


def _constant(instruction: Instruction | None) -> int | None:
  if instruction is None or instruction.opcode != "constant":
    return None
  found = re.fullmatch(r"-?\d+", instruction.arguments.strip())
  return int(found.group()) if found else None
