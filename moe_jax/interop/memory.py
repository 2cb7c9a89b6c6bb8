"""Whether a model fits into memory, said before anything is loaded."""

import pathlib

import jax

from moe_jax.errors import InputError


def check_memory(what: str, needed: dict[jax.Device, int], dtype: str) -> None:
  """Raises `InputError` if devices of this process have less memory than they need, where that is known.

  Args:
    what: appears in the error.
    needed: bytes by device.
    dtype: of the parameters.
  """
  if next(iter(needed)).platform == "cpu":
    _compare(what, sum(needed.values()), _free_on_host(), dtype, len(needed), "this host")
    return
  for device, size in needed.items():
    stats = device.memory_stats() or {}
    free = stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None
    _compare(what, size, free, dtype, len(needed), str(device))


def _compare(what: str, size: int, free: int | None, dtype: str, num_devices: int, where: str) -> None:
  if free is None or size <= free:
    return
  smaller = "" if dtype == "bfloat16" else f"; dtype='bfloat16' needs {size / 2e9:.1f} GB"
  devices = -(-size * num_devices // max(free, 1))
  such = f"{-(-size // max(free, 1))} such hosts" if where == "this host" else f"{devices} such devices"
  raise InputError(
    f"{what}: needs {size / 1e9:.1f} GB in {dtype}, and {where} has {free / 1e9:.1f} GB free{smaller}; or a mesh that splits "
    f"it over {such}; moe_jax.LayerStream (examine.py --stream) keeps one layer in memory at a time"
  )


def _free_on_host() -> int | None:
  try:
    lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
  except (OSError, StopIteration):  # only Linux says
    return None
