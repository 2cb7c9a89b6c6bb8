"""Parses compiled programs: their instructions, and how often each one runs.

XLA's own cost analysis counts the body of a loop once, however often it runs. In a model that scans over its layers,
almost everything is in the body of a loop. Here, every computation has the number of times that one step runs it.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128, "bf16": 16}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
# Of a Pallas kernel: the only attribute that is written on several lines.
_METADATA = re.compile(r"(kernel_metadata=\{)\n([^\n]*)\n\}")
_NAME = re.compile(r"%([\w.\-]+)")


class Instruction(NamedTuple):
  """One line of a computation."""

  name: str
  shape: str  # with layouts; a tuple is in parentheses
  opcode: str
  operands: tuple[str, ...]  # names
  arguments: str  # the text between the parentheses
  attributes: str  # the text after them
  is_root: bool


class Program(NamedTuple):
  """A module. `runs` is the number of times that one step runs each reachable computation."""

  computations: dict[str, dict[str, Instruction]]
  runs: dict[str, int]
  unknown_loops: tuple[str, ...]  # loops whose number of iterations depends on data; counted as one iteration

  def executed(self) -> Iterator[tuple[str, Instruction, int]]:
    """Yields (computation, instruction, runs) of all instructions that run."""
    for computation, runs in self.runs.items():
      for instruction in self.computations[computation].values():
        yield computation, instruction, runs


def arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
  """Returns (element type, dimensions) of each array in a shape, with tuples flattened.

  >>> arrays("(bf16[2,4]{1,0:T(8,128)}, u32[])")
  [('bf16', (2, 4)), ('u32', ())]
  """
  return [
    (kind, tuple(int(size) for size in sizes.split(",") if size)) for kind, sizes in _ARRAY.findall(shape)
  ]


def num_bytes(shape: str) -> int:
  """Returns the bytes of all arrays in a shape, without padding."""
  return sum(math.prod(sizes) * _bits(kind) for kind, sizes in arrays(shape)) // 8


def _bits(kind: str) -> int:
  if kind in _BITS:
    return _BITS[kind]
  found = re.match(r"[a-z]+(\d+)", kind)
  return int(found.group(1)) if found else 0


def parse(text: str) -> Program:
  """Parses the text of `compiled.as_text()`."""
  text = _METADATA.sub(r"\1\2}", text)
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
  """Returns the position at which the parenthesis opened at `opening` closes."""
  depth = 0
  for match in re.compile(r"[()]").finditer(text, opening):
    depth += 1 if match.group() == "(" else -1
    if depth == 0:
      return match.start()
  raise ValueError(f"no closing parenthesis: {text[:80]}")


def called(instruction: Instruction) -> list[str]:
  """Returns the computations that an instruction runs each time, including the condition of a loop.

  The second halves of asynchronous pairs run nothing. The scalar computations of reductions and sorts do not count.
  """
  if instruction.opcode.endswith(("-done", "-update")):
    return []
  keys = "calls|called_computations|body|condition|branch_computations|true_computation|false_computation"
  if instruction.opcode.startswith("call"):
    keys += "|to_apply"
  found = re.findall(rf"\b(?:{keys})=(\{{[^}}]*\}}|%[\w.\-]+)", instruction.attributes)
  return [name for part in found for name in _NAME.findall(part)]


def _count_runs(computations: dict, entry: str) -> tuple[dict[str, int], tuple[str, ...]]:
  """Counts the runs of every computation, as if every branch of a conditional were taken."""
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
  """Returns how often a loop's body runs, or None if this depends on data.

  The compilers for CPU and GPU write the number into the program. The compiler for TPU does not. There, the number
  comes from a condition that compares a counter in the loop's state, which starts at a constant and increases by one,
  with another constant.
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
  """Returns the constant with which an element of the loop's state starts."""
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
