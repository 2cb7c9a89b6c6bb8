"""Who is this process? From the flags, and for what they leave open from the launcher."""

import dataclasses
import importlib.util
import warnings
from collections.abc import Mapping
from typing import Any

from moe_jax.errors import InputError

_MAX_SECONDS = 1_000_000  # 12 days; JAX takes whole seconds of 32 bits


@dataclasses.dataclass(frozen=True)
class Options:
  """What the command line may say, see `define_flags`. Empty and -1: from the launcher's environment."""

  coordinator_address: str = ""
  num_processes: int = -1
  process_id: int = -1
  initialization_timeout: float = 300.0
  heartbeat_timeout: float = 60.0


@dataclasses.dataclass(frozen=True)
class Placement:
  """Where this process is among all."""

  coordinator_address: str
  num_processes: int
  process_id: int
  local_devices: tuple[int, ...] | None = None  # GPUs that belong to this process; None: all that it sees


def find_placement(options: Options, environment: Mapping[str, str]) -> Placement | None:
  """From the flags, and for what they leave open from the launcher; None: this process runs alone.

  Raises:
    InputError: the flags and the environment do not tell all, or contradict themselves; a time limit is not in
      [1 s, 10^6 s].
  """
  for name in ("initialization_timeout", "heartbeat_timeout"):
    if not 1 <= getattr(options, name) <= _MAX_SECONDS:  # nan, too, is in no interval
      raise InputError(f"--{name}={getattr(options, name)}: must be seconds from 1 to {_MAX_SECONDS:,}")
  if options.num_processes == 1:
    return None
  launcher = _launcher(environment) if options.num_processes < 1 or options.process_id < 0 else ""
  found = _from_launcher(launcher, options, environment) if launcher else {}
  given = {
    "coordinator_address": options.coordinator_address or environment.get("JAX_COORDINATOR_ADDRESS", ""),
    "num_processes": options.num_processes if options.num_processes >= 1 else None,
    "process_id": options.process_id if options.process_id >= 0 else None,
  }
  known = found | {name: value for name, value in given.items() if value not in (None, "")}
  asked = [
    name for name in ("coordinator_address", "num_processes", "process_id") if _is_given(options, name)
  ]
  if not asked and not launcher:
    return None
  if known.get("num_processes") == 1:
    return None
  for name in ("coordinator_address", "num_processes", "process_id"):
    if name not in known:
      because = f"--{asked[0]} is given" if asked else f"{launcher} started several processes"
      raise InputError(f"--{name}: must be given too, for {because} and nothing here tells it")
  place = Placement(**known)
  split_address(place.coordinator_address)
  if not 0 <= place.process_id < place.num_processes:
    raise InputError(
      f"--process_id={place.process_id}: must be between 0 and {place.num_processes - 1}, for "
      f"--num_processes={place.num_processes}"
    )
  return place


def _is_given(options: Options, name: str) -> bool:
  return getattr(options, name) != getattr(Options(), name)


def _launcher(environment: Mapping[str, str]) -> str:
  """slurm, ompi, gketpu or gcetpu (names of JAX's detection methods); empty: none, or one with a single process."""
  if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
    return "ompi"
  if "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", 1)) > 1:
    return "slurm"
  if not (environment.get("JAX_PLATFORMS") or "tpu").startswith("tpu") or not importlib.util.find_spec(
    "libtpu"
  ):
    return ""
  if (
    environment.get("TPU_WORKER_HOSTNAMES", "").count(",")
    or int(environment.get("MEGASCALE_NUM_SLICES", 1)) > 1
  ):
    return "gketpu"
  from jax._src import cloud_tpu_init

  return "gcetpu" if getattr(cloud_tpu_init, "running_in_cloud_tpu_vm", False) else ""


def _from_launcher(launcher: str, options: Options, environment: Mapping[str, str]) -> dict[str, Any]:
  if launcher == "ompi" and "OMPI_MCA_orte_hnp_uri" not in environment:
    # Open MPI 5 names no address; the caller asks for one.
    found = {
      "num_processes": int(environment["OMPI_COMM_WORLD_SIZE"]),
      "process_id": int(environment["OMPI_COMM_WORLD_RANK"]),
    }
  else:
    found = _detect(launcher, options)
  local = {"ompi": "OMPI_COMM_WORLD_LOCAL_RANK", "slurm": "SLURM_LOCALID"}.get(launcher)
  if found and local in environment:
    found["local_devices"] = _own_gpus(int(environment[local]), environment)
  return found


def _detect(launcher: str, options: Options) -> dict[str, Any]:
  """What JAX's own detection finds; empty on a TPU machine that is no part of a pod."""
  from jax._src.clusters import ClusterEnv

  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      address, count, index, _ = ClusterEnv.auto_detect_unset_distributed_params(
        options.coordinator_address or None, None, None, None, launcher, int(options.initialization_timeout)
      )
  except Exception as error:
    if launcher == "gcetpu":  # a machine without a metadata server, such as a container: one process
      return {"num_processes": 1}
    raise InputError(
      f"--coordinator_address, --num_processes, --process_id: {launcher} was found but not understood ("
      f"{' '.join(str(error).split())[:200]}); give all three"
    ) from None
  found = {"coordinator_address": address, "num_processes": count, "process_id": index}
  return {name: value for name, value in found.items() if value is not None} or {"num_processes": 1}


def _own_gpus(local_id: int, environment: Mapping[str, str]) -> tuple[int, ...] | None:
  """One GPU per process where a node has several processes that all see the same GPUs; else all that it sees."""
  visible = environment.get("CUDA_VISIBLE_DEVICES", "")
  names = ("OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
  tasks = next((environment[name] for name in names if name in environment), "1")
  sees_one = bool(visible) and "," not in visible
  return None if sees_one or tasks.partition("(")[0] == "1" else (local_id,)


def is_loopback(host: str) -> bool:
  """Whether only processes of this machine can reach `host`."""
  return host in ("localhost", "::1") or host.startswith("127.")


def split_address(address: str) -> tuple[str, int]:
  """(host, port). Raises `InputError` where there is no port."""
  host, _, port = address.rpartition(":")
  if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
    raise InputError(f"--coordinator_address={address}: must be HOST:PORT of process 0")
  return host.strip("[]"), int(port)
