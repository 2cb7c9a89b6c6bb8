"""Finds which exchanges of rows a compiled program overlaps with matrix products."""

from typing import NamedTuple

from moe_jax.analysis.hlo import Instruction, Program, called

_KINDS = ("ragged-all-to-all", "all-to-all")
_PRODUCTS = ("dot", "convolution")


class Exchange(NamedTuple):
  """One all-to-all of the program."""

  kind: str  # one of ragged-all-to-all, all-to-all
  name: str
  waits: bool  # nothing else runs meanwhile, because there is no pair of start and done
  products: int  # matrix products that are scheduled between start and done


def exchanges(program: Program) -> list[Exchange]:
  """Returns every exchange that a step runs. The text of a TPU program lists instructions in scheduled order."""
  found = []
  for computation in program.runs:
    done, started = 0, {}
    for instruction in program.computations[computation].values():
      opcode = instruction.opcode
      kind = opcode.removesuffix("-start").removesuffix("-done")
      if opcode in _KINDS:
        found.append(Exchange(kind, instruction.name, True, 0))
      elif kind in _KINDS and opcode.endswith("-start"):
        started[instruction.name] = done
      elif kind in _KINDS:
        start = instruction.operands[0]
        found.append(Exchange(kind, start, False, done - started[start]))
      done += _is_product(instruction, program)
  return found


def _is_product(instruction: Instruction, program: Program) -> bool:
  """Whether this is a matrix product: a single one, one in a fusion, or the kernel of `lax.ragged_dot`."""
  if instruction.opcode == "custom-call":
    return "ragged_dot" in instruction.attributes and "metadata" not in instruction.name
  if instruction.opcode == "fusion":
    inside = (program.computations.get(name, {}) for name in called(instruction))
    return any(part.opcode in _PRODUCTS for computation in inside for part in computation.values())
  return instruction.opcode in _PRODUCTS
