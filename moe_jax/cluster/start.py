"""Several processes: who they are, how they start, and end together.

A process is one of several under SLURM, Open MPI or on a TPU pod (also several slices), or where flags say so.
Everywhere else nothing happens here, and JAX is not imported.
"""

import dataclasses
import hashlib
import importlib.util
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from absl import flags

from moe_jax.cluster import roll_call
from moe_jax.errors import InputError

_FALLBACK = (
  40.0  # seconds that JAX's own heartbeats, which end a process with a stack trace, come later than ours
)


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


_watch: roll_call.Watch | None = None


def define_flags() -> None:
  """One flag per field of `Options`."""
  default = Options()
  where = "found under SLURM, Open MPI and on TPU pods"
  flags.DEFINE_string(
    "coordinator_address", default.coordinator_address, f"HOST:PORT of process 0; empty: {where}"
  )
  flags.DEFINE_integer(
    "num_processes", default.num_processes, f"of the run; -1: {where}; 1: this one runs alone"
  )
  flags.DEFINE_integer("process_id", default.process_id, f"of this process, from 0; -1: {where}")
  flags.DEFINE_float(
    "initialization_timeout",
    default.initialization_timeout,
    "seconds to wait until all processes have joined",
  )
  flags.DEFINE_float(
    "heartbeat_timeout",
    default.heartbeat_timeout,
    "seconds without a sign after which a process counts as dead",
  )


def options_from_flags() -> Options:
  return Options(**{field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(Options)})


def on_every_process(main: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
  """`main` that first joins the other processes, and whose failure in one process ends it in all.

  With one process it is `main`. Needs `define_flags`.
  """

  def joined(argv: list[str]) -> None:
    if not start(options_from_flags()):
      main(argv)
      return
    try:
      main(argv)
    except InputError as error:
      _stop_all(" ".join(str(error).split()), 2)
    except KeyboardInterrupt:
      _stop_all("stopped from the keyboard; the same command continues where it was", 130)
    except SystemExit as error:
      _stop_all(f"exit status {error.code}", error.code if isinstance(error.code, int) else 1)
    except BaseException as error:
      traceback.print_exc()
      _stop_all(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", 1)
    finish()

  return joined


def start(options: Options) -> bool:
  """Joins the other processes; False, and nothing is done, if there are none. Before JAX looks for devices.

  Raises:
    InputError: who is missing after `initialization_timeout`; a setting that is missing or contradicts.
  """
  global _watch
  place = find_placement(options, os.environ)
  if place is None:
    return False
  roll = roll_call.Roll(
    place.coordinator_address,
    place.num_processes,
    place.process_id,
    options.initialization_timeout,
    options.heartbeat_timeout,
    _digest(sys.argv[1:]),
  )
  _watch = roll_call.join(roll)
  import jax

  # Its SIGTERM handler keeps a process alive that is told to end.
  jax.config.update("jax_enable_preemption_service", False)
  if (jax.config.jax_platforms or "").startswith("cpu"):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    _silence_libraries()
  host, port = roll_call.split_address(place.coordinator_address)
  jax.distributed.initialize(
    place.coordinator_address,
    place.num_processes,
    place.process_id,
    local_device_ids=place.local_devices,
    cluster_detection_method="deactivate",  # done above
    initialization_timeout=max(int(options.initialization_timeout), 1),
    heartbeat_timeout_seconds=int(options.heartbeat_timeout + _FALLBACK),
    coordinator_bind_address=f"{host}:{port}" if roll_call.is_loopback(host) else None,
  )
  return True


def _silence_libraries() -> None:
  """Gloo writes pieces of lines to the standard output from several threads: only what Python prints still gets there."""
  if sys.stdout is not sys.__stdout__ or sys.stdout.fileno() != 1:
    return  # someone reads it already
  sys.stdout.flush()
  own = os.dup(1)
  sys.stdout = os.fdopen(own, "w", buffering=1, encoding=sys.stdout.encoding, errors=sys.stdout.errors)
  with open(os.devnull, "wb") as nowhere:
    os.dup2(nowhere.fileno(), 1)


def finish() -> None:
  """The planned end: waits for the others, then leaves them."""
  global _watch
  import jax

  jax.distributed.shutdown()
  if _watch is not None:
    _watch.leave()
    _watch = None


def _stop_all(line: str, status: int) -> NoReturn:
  print(f"error: {line}" if status != 130 else f"\n{line}", file=sys.stderr, flush=True)
  _watch.stop(line, status)


def _digest(arguments: Sequence[str]) -> str:
  """Of the flags that all processes must share."""
  shared = [a for a in arguments if not a.lstrip("-").startswith("process_id")]
  return hashlib.sha256("\0".join(shared).encode()).hexdigest()[:16]


# Who is this process?


def find_placement(options: Options, environment: Mapping[str, str]) -> Placement | None:
  """From the flags, and for what they leave open from the launcher; None: this process runs alone.

  Raises:
    InputError: the flags and the environment do not tell all, or contradict themselves.
  """
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
  roll_call.split_address(place.coordinator_address)
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
