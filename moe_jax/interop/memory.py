"""Whether a model fits into memory, said before anything is loaded."""

import collections
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from moe_jax.errors import InputError
from moe_jax.interop.names import Path, Stored


def check_memory(
  what: str, needed: Mapping[jax.Device, int], dtype: str, *, layer: int = 0, kept: int = 0
) -> None:
  """Raises `InputError` if devices of this process have less memory than they need, where that is known.

  The error names what would fit.

  Args:
    what: appears in the error.
    needed: bytes of parameters by device.
    dtype: of the parameters.
    layer: bytes of the largest layer, if the model can be read layer by layer; else 0.
    kept: bytes beside the parameters, on the host or on each device.
  """
  if next(iter(needed)).platform == "cpu":
    places = [("this host", "hosts", 1, sum(needed.values()), _free_on_host())]
  else:
    places = [(str(device), "devices", len(needed), size, _free(device)) for device, size in needed.items()]
  for where, kind, number, size, free in places:
    if free is None or size + kept <= free:
      continue
    ways, rest, halves = [], free - kept, dtype != "bfloat16"
    if halves and size / 2 <= rest:
      ways.append(f"dtype='bfloat16' needs {_gb(size / 2 + kept)}")
    if rest > 0:
      ways.append(f"a mesh that splits it over {-(-size * number // rest)} such {kind}")
    if kept and size < free:
      ways.append("fewer or shorter batches")
    if layer and layer / (2 if halves else 1) <= rest:
      other, bytes_ = ("", layer) if layer <= rest else (" with dtype='bfloat16'", layer / 2)
      ways.append(
        f"moe_jax.LayerStream (examine.py --stream){other} keeps one layer in memory at a time, "
        f"of which the largest has {_gb(bytes_)}"
      )
    instead = f"; {'; or '.join(ways)}" if ways else ""
    raise InputError(f"{what} needs {_gb(size + kept)} in {dtype}, and {where} has {_gb(free)} free{instead}")


def largest_layer(
  found: Iterable[Stored],
  types: Mapping[Path, np.dtype],
  layouts: Mapping[Path, Any] | None = None,
) -> int:
  """Returns the bytes of the largest layer; with layouts, of one device's parts of it."""
  sizes: collections.Counter[Path] = collections.Counter()
  for path, shape, _ in found:
    if path[0] == "segments":  # its number, "pattern", "blocks", and the number of the block
      layout = None if layouts is None else layouts[path]  # that of a balancer's state is a tree
      own = layout.shard_shape(shape) if isinstance(layout, jax.sharding.Sharding) else shape
      sizes[path[:5]] += math.prod(own[1:]) * types[path].itemsize
  return max(sizes.values(), default=0)


def _gb(size: float) -> str:
  return f"{size / 1e9:.1f} GB"


def _free(device: jax.Device) -> int | None:
  stats = device.memory_stats() or {}
  return stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None


def _free_on_host() -> int | None:
  try:
    lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
  except (OSError, StopIteration):  # only Linux says
    return None
