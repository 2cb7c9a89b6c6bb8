"""The process that writes checkpoints beside a run. `idle_saver` starts it by the name of this file, with one JSON object.

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
_MINUTES = 5  # that one of a group waits for another, which rests most of the time


def main(said: dict[str, Any]) -> None:
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)  # they are for the run, which decides what is saved
  ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGKILL)
  if os.getppid() != said["parent"]:
    return
  output = os.fdopen(os.dup(1), "w", buffering=1)
  os.dup2(2, 1)
  output.write("ready\n")
  import jax  # takes a second, in which the run may be killed

  from moe_jax.training import digests
  from moe_jax.training.orbax_writer import OrbaxWriter
  from moe_jax.training.shared_arrays import arrays_in

  if said["group"]:
    join(**said["group"])
  memory = mmap.mmap(said["handle"], said["num_bytes"])
  writer = OrbaxWriter(pathlib.Path(said["folder"]), said["keep"], collectives=False)
  for line in sys.stdin.buffer:
    request = json.loads(line)
    arrays = arrays_in(memory, request["arrays"])
    state = jax.tree.map(arrays.__getitem__, request["tree"])
    found = digests_of_group(state, request["step"]) if said["group"] else digests.array_digests(state)
    writer.write(request["step"], state, request["extra"], found)
    writer.wait()
    output.write("saved\n")


def join(address: str, bind: str, count: int, index: int, num_devices: int) -> None:
  """Joins the processes beside the others of the run. They compute nothing together, and need no collectives."""
  import jax

  jax.config.update("jax_num_cpu_devices", num_devices)
  jax.config.update("jax_cpu_collectives_implementation", None)
  jax.distributed.initialize(
    address,
    count,
    index,
    coordinator_bind_address=bind,
    cluster_detection_method="deactivate",
    initialization_timeout=60 * _MINUTES,
  )


def digests_of_group(state: Any, step: int) -> dict[str, list]:
  """Returns what `digests.array_digests` does, in the first process. All must call it."""
  import jax
  import orbax.checkpoint as ocp
  from jax._src import distributed

  from moe_jax.training import digests

  client = distributed.global_state.client
  leaves = ocp.tree.to_flat_dict(state, sep=".")
  parts = {path: digests.own_part(leaf) for path, leaf in leaves.items()}
  if jax.process_index():
    client.key_value_set(f"moe_jax/digests/{step}/{jax.process_index()}", json.dumps(parts))
    return {}
  for index in range(1, jax.process_count()):
    text = client.blocking_key_value_get(f"moe_jax/digests/{step}/{index}", 60_000 * _MINUTES)
    parts = {path: (parts[path] + part) % 2**32 for path, part in json.loads(text).items()}
  return {path: [kind, parts[path]] for path, kind in digests.kinds_of_arrays(state).items()}


if __name__ == "__main__":
  try:
    main(json.loads(sys.argv[1]))
  finally:
    os._exit(1)  # the run writes what is missing; Orbax's threads may never end
