"""Several processes: how they start, and end together.

A process is one of several under SLURM, Open MPI or on a TPU pod (also several slices), or where flags say so.
Everywhere else nothing happens here, and JAX is not imported.
"""

import dataclasses
import importlib.metadata
import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from typing import NoReturn

from absl import flags

from moe_jax.cluster import abort
from moe_jax.cluster.placement import Options, Placement, find_placement, is_loopback, split_address
from moe_jax.cluster.watch import Watch, end
from moe_jax.errors import INTERRUPTED_STATUS, STOPPED_STATUS, InputError, Stopped, of_the_system
from moe_jax.fingerprint import of_package


def define_flags() -> None:
  """One flag per field of `Options`."""
  default = Options()
  found = "by default found from SLURM, Open MPI or the TPU pod"
  flags.DEFINE_string(
    "coordinator_address",
    default.coordinator_address,
    f"HOST:PORT at which process 0 of a run of several processes can be reached; {found}",
  )
  flags.DEFINE_integer(
    "num_processes",
    default.num_processes,
    f"number of processes of the run; 1 runs this one alone wherever it is; -1 is {found}",
  )
  flags.DEFINE_integer("process_id", default.process_id, f"number of this process, from 0; -1 is {found}")
  flags.DEFINE_float(
    "initialization_timeout",
    default.initialization_timeout,
    "seconds after which a process stops waiting for the others to start",
  )
  flags.DEFINE_float(
    "heartbeat_timeout",
    default.heartbeat_timeout,
    "seconds without a heartbeat after which a process counts as dead and the others stop; whole seconds",
  )


def options_from_flags() -> Options:
  return Options(**{field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(Options)})


def on_every_process(main: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
  """`main` that first joins the other processes, and whose failure in one process ends all.

  With one process it is `main`. Needs `define_flags`.
  """

  def joined(argv: list[str]) -> None:
    watch = start(options_from_flags())
    if watch is None:
      main(argv)
      return
    import jax

    stopped = False
    try:
      watch.check_same_start(sys.argv[1:], _versions())
      main(argv)
    except Stopped as error:  # in all processes, at one step
      stopped = True
      if jax.process_index() == 0:
        print(error, file=sys.stderr)
    except InputError as error:
      watch.stop(" ".join(str(error).split()), 2)
    except OSError as error:
      line = of_the_system(error)
      watch.stop(str(line or error), 2 if line else 1, trace="" if line else traceback.format_exc())
    except KeyboardInterrupt:
      watch.stop(
        "stopped from the keyboard; the same command continues from the last checkpoint", INTERRUPTED_STATUS
      )
    except SystemExit as error:
      watch.stop(f"exit status {error.code}", error.code if isinstance(error.code, int) else 1)
    except BaseException as error:
      line = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
      watch.stop(line, 1, trace=traceback.format_exc())
    watch.leave()
    jax.distributed.shutdown()
    if stopped:
      sys.exit(STOPPED_STATUS)

  return joined


def on_one_process(main: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
  """`main` that refuses to be one of several processes, before it does anything. Needs `define_flags`.

  For what holds whole models, measures them or writes them.
  """

  def alone(argv: list[str]) -> None:
    place = find_placement(options_from_flags(), os.environ)
    if place is not None:
      raise InputError(
        f"--num_processes={place.num_processes}: this command is for one process; start it once, with --num_processes=1"
      )
    main(argv)

  return alone


def _versions() -> list[str]:
  """What computes the numbers of a run, beside its flags, in words."""
  libraries = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib")]
  return [f"moe_jax [{of_package()}]", *libraries]


def start(options: Options) -> Watch | None:
  """Joins the other processes; None, and nothing is done, if there are none. Before JAX looks for devices.

  Ends the process with one line if not all have joined within `initialization_timeout`.

  Raises:
    InputError: a setting that is missing or contradicts another; process 0 cannot listen at its address.
  """
  place = find_placement(options, os.environ)
  if place is None:
    return None
  host, port = split_address(place.coordinator_address)
  bind = host if is_loopback(host) else ""
  if place.process_id == 0:
    _check_free(bind, port)
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # JAX warns of recoverability, below
  abort.in_one_line(
    f"process {place.process_id} of {place.num_processes} has lost process 0 at {place.coordinator_address}, or counts as "
    "gone; the same command continues from the last checkpoint"
  )
  import jax
  from jax._src import distributed

  # The preemption service's SIGTERM handler keeps a process alive that is told to end.
  jax.config.update("jax_enable_preemption_service", False)
  # Without it, JAX aborts all processes with a stack trace when one is gone.
  jax.config.update("jax_enable_recoverability", True)
  if (jax.config.jax_platforms or "").startswith("cpu"):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    _silence_libraries()
  # JAX's own time limit aborts, with a stack trace.
  waiting = threading.Timer(options.initialization_timeout, _end_waiting, (place, options))
  waiting.daemon = True
  waiting.start()
  jax.distributed.initialize(
    place.coordinator_address,
    place.num_processes,
    place.process_id,
    local_device_ids=place.local_devices,
    cluster_detection_method="deactivate",  # done above
    initialization_timeout=int(options.initialization_timeout) + 60,
    heartbeat_timeout_seconds=max(int(options.heartbeat_timeout), 1),
    coordinator_bind_address=f"{bind}:{port}" if bind else None,
  )
  waiting.cancel()
  client = distributed.global_state.client
  return Watch(client, place.process_id, place.num_processes, options.heartbeat_timeout)


def _check_free(host: str, port: int) -> None:
  """Raises `InputError` where JAX, which does not check that it can listen, would crash."""
  try:
    socket.create_server((host, port)).close()
  except OSError as error:
    raise InputError(
      f"--coordinator_address: process 0 cannot listen at port {port} ({error.strerror}); choose a free port of "
      "the machine on which process 0 runs"
    ) from None


def _end_waiting(place: Placement, options: Options) -> NoReturn:
  """Ends this process with one line that says what it can know of who is missing."""
  me, limit = place.process_id, f"within {options.initialization_timeout:g} s (--initialization_timeout)"
  try:
    socket.create_connection(split_address(place.coordinator_address), timeout=5.0).close()
  except OSError:
    end(f"--coordinator_address={place.coordinator_address}: process {me} did not find process 0 {limit}", 2)
  end(
    f"--num_processes={place.num_processes}: not all processes joined at {place.coordinator_address} {limit}; this "
    f"is process {me}, and those are missing that do not print this line",
    2,
  )


def _silence_libraries() -> None:
  """Keeps Gloo, which writes pieces of lines from several threads, off the standard output; Python still prints."""
  if sys.stdout is not sys.__stdout__ or sys.stdout.fileno() != 1:
    return  # someone reads it already
  sys.stdout.flush()
  own = os.dup(1)
  sys.stdout = os.fdopen(own, "w", buffering=1, encoding=sys.stdout.encoding, errors=sys.stdout.errors)
  with open(os.devnull, "wb") as nowhere:
    os.dup2(nowhere.fileno(), 1)
