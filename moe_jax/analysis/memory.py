"""The memory that a compiled program needs on a device, and whether it fits."""

import re
from typing import NamedTuple

GIB = 2**30
# Nominal memory per chip. Compilers reserve a part of it, which `Memory.capacity` does not subtract.
# https://cloud.google.com/tpu/docs/system-architecture-tpu-vm
HBM_BYTES = {
  "TPU v4": 32 * GIB,
  "TPU v5 lite": 16 * GIB,
  "TPU v5": 95 * GIB,
  "TPU v6 lite": 32 * GIB,
}


class Memory(NamedTuple):
  """Bytes on one device."""

  arguments: int  # parameters, optimizer state and batch
  outputs: int
  aliased: int  # outputs that reuse donated arguments
  temporaries: int  # activations, gradients, buffers of exchanges
  program: int
  capacity: int | None  # of the device, if known

  @property
  def peak(self) -> int:
    """The total memory held at one time. Temporaries are the compiler's maximum over time."""
    return self.arguments + self.outputs - self.aliased + self.temporaries + self.program

  @property
  def free(self) -> int | None:
    return None if self.capacity is None else self.capacity - self.peak


def memory_of(compiled, device_kind: str) -> Memory:
  """Returns the memory of a program from `compiled.memory_analysis()`, which is per device.

  On TPU, its temporaries include on-chip memories. `total_allocation_bytes` is HBM only, including the arguments.
  """
  stats = compiled.memory_analysis()
  temporaries = stats.temp_size_in_bytes
  in_hbm = getattr(stats, "total_allocation_bytes", 0)
  if device_kind.startswith("TPU") and in_hbm:
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    temporaries = in_hbm - stats.argument_size_in_bytes - outputs
  return Memory(
    arguments=stats.argument_size_in_bytes,
    outputs=stats.output_size_in_bytes,
    aliased=stats.alias_size_in_bytes,
    temporaries=temporaries,
    program=stats.generated_code_size_in_bytes,
    capacity=HBM_BYTES.get(device_kind),
  )


def out_of_memory(message: str) -> tuple[float, float] | None:
  """Returns (bytes needed, bytes available) from the TPU compiler's out-of-memory error, or None for other errors.

  The compiler has two such messages, one before it assigns addresses and one after.
  """
  number = r"([\d.]+)([KMGT]?)"
  found = re.search(rf"Used {number} of {number} hbm", message) or re.search(
    rf"\({number}\) exceeds available HBM \({number}\)", message
  )
  if found is None:
    return None
  unit = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
  used, used_unit, there, there_unit = found.groups()
  return float(used) * unit[used_unit], float(there) * unit[there_unit]
