"""Devices to compile for: TPU slices described by libtpu, or virtual CPU devices."""

import contextlib
import importlib.util
import os
import re
from collections.abc import Iterator

import jax
from jax.experimental import topologies

from moe_jax import sharding
from moe_jax.errors import InputError

EXAMPLES = "v5p:4x4x4, v5e:4x4, v6e:4x4, v4:4x4x4 or cpu:8"
# By default, a v4 chip is two devices. Everything here counts chips.
_OPTIONS = {"v4": {"chip_config_name": "megacore"}}


def devices_of(topology: str, num_slices: int = 1) -> list[jax.Device]:
  """Returns the devices of `topology`, one per chip. Call it before anything asks JAX for its devices.

  Args:
    topology: GENERATION:SHAPE as libtpu names TPU slices, e.g. v5p:4x4x4 for 64 chips, or cpu:8.
    num_slices: the number of slices, connected by a data centre's network.

  Raises:
    InputError: if the compiler does not know the topology, libtpu is not installed, or there are several slices of CPU
      devices.
  """
  generation, _, shape = topology.partition(":")
  if generation == "cpu":
    return _cpu_devices(topology, shape, num_slices)
  if importlib.util.find_spec("libtpu") is None:
    raise InputError(
      f"--topology={topology}: the TPU compiler is not installed: pip install -e '.[tpu]'; cpu:8 needs none"
    )
  # Describing a slice needs neither a local TPU nor the metadata service of a TPU machine.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  jax.config.update("jax_platforms", "cpu")
  slices = {"num_slices": num_slices} if num_slices > 1 else {}
  try:
    with _quiet():
      described = topologies.get_topology_desc(topology, "tpu", **_OPTIONS.get(generation, {}), **slices)
  except jax.errors.JaxRuntimeError as error:
    reason = re.sub(r"^[A-Z_]+: ", "", str(error).splitlines()[0])
    raise InputError(
      f"--topology={topology}: unknown to the TPU compiler ({reason}); use e.g. {EXAMPLES}"
    ) from error
  return list(described.devices)


def compiler_options(devices: list[jax.Device], hbm_gib: float = 0.0) -> dict[str, str]:
  """Returns the compiler options of a run on these devices.

  `hbm_gib` is the memory per chip that a program may use; 0: all of it. The compiler uses spare memory if it can.
  """
  platform = devices[0].platform
  limit = {"xla_tpu_max_hbm_size_mib": str(round(hbm_gib * 1024))} if hbm_gib and platform == "tpu" else {}
  return sharding.compiler_options(platform) | limit


def _cpu_devices(topology: str, number: str, num_slices: int) -> list[jax.Device]:
  if not re.fullmatch(r"[1-9]\d{0,3}", number):
    raise InputError(f"--topology={topology}: cpu:N with N from 1 to 9999 virtual devices")
  if num_slices > 1:
    raise InputError(f"--slice_parallelism={num_slices}: {topology} has no slices; leave it at 1")
  # XLA_FLAGS and jax_num_cpu_devices would contradict each other.
  flags = os.environ.get("XLA_FLAGS", "")
  os.environ["XLA_FLAGS"] = re.sub(r"--xla_force_host_platform_device_count=\d+", "", flags).strip()
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", int(number))
  return jax.devices()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Silences libtpu's warnings about the missing TPU, which bypass Python's stderr."""
  kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
  os.dup2(nowhere, 2)
  try:
    yield
  finally:
    os.dup2(kept, 2)
    os.close(kept)
    os.close(nowhere)
