"""The process that writes checkpoints beside a run. `idle_saver` starts it by the name of this file.

Standard input has one JSON object in a line for each checkpoint. Standard output has a line as soon as the process will end with the
run, and one for each checkpoint that is written. Whatever goes wrong ends it.
"""

import ctypes
import json
import mmap
import os
import pathlib
import signal
import sys
from typing import Any

_DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl


def arrays_in(memory: mmap.mmap, spec: list[list]) -> list[Any]:
  """Returns the arrays of `spec` (name of the type, shape, first byte) in `memory`, without a copy."""
  import jax.numpy as jnp

  from moe_jax.training.orbax_writer import Unshared

  return [Unshared(tuple(shape), jnp.dtype(name), memory, start) for name, shape, start in spec]


def main(folder: str, keep: str, handle: str, num_bytes: str, parent: str) -> None:
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)  # they are for the run, which decides what is saved
  os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
  ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGKILL)
  if os.getppid() != int(parent):
    return
  output = os.fdopen(os.dup(1), "w", buffering=1)
  os.dup2(2, 1)
  output.write("ready\n")
  import jax  # takes a second, in which the run may be killed

  from moe_jax.training.orbax_writer import OrbaxWriter

  memory = mmap.mmap(int(handle), int(num_bytes))
  writer = OrbaxWriter(pathlib.Path(folder), int(keep))
  for line in sys.stdin.buffer:
    request = json.loads(line)
    arrays = arrays_in(memory, request["arrays"])
    state = jax.tree.map(arrays.__getitem__, request["tree"])
    writer.write(request["step"], state, request["extra"])
    writer.wait()
    output.write("saved\n")


if __name__ == "__main__":
  try:
    main(*sys.argv[1:])
  finally:
    os._exit(1)  # the run writes what is missing; Orbax's threads may never end
