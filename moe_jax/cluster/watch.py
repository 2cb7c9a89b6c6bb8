"""How the processes of one run end together. What `jax.distributed` does of it, and what not: docs/adr/0007.

The messages go through the key-value store of `jax.distributed`. A key is set once, so the first reason to stop wins.
"""

import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from moe_jax.cluster import abort
from moe_jax.errors import INTERRUPTED_STATUS, STOPPED_STATUS, InputError

_STOP, _HOST, _FLAGS = "moe_jax/stop", "moe_jax/host", "moe_jax/flags"
# Milliseconds: a wait that a message ends, one that starts again, and what a process that is alive needs to answer.
_FOREVER, _HOUR, _ANSWER = 2**31 - 1, 3_600_000, 5000

THREAD = "moe_jax watch"  # the name of the threads of `Watch`

_current: "Watch | None" = None  # of this process; None: it is alone


def stop_all(line: str, status: int, trace: str = "") -> None:
  """Ends all processes of the run, from any thread of any of them: see `Watch.stop`. Returns if this one is alone."""
  if _current is not None:
    _current.stop(line, status, trace)


class Watch:
  """Two threads that end this process when another one stops or is gone, until `leave`.

  Args:
    client: `jax._src.distributed.global_state.client`, connected, in a run with `jax_enable_recoverability`.
    process_id: of this process.
    num_processes: of the run.
    heartbeat_timeout: seconds without a heartbeat after which JAX counts a process as gone.
  """

  def __init__(self, client: Any, process_id: int, num_processes: int, heartbeat_timeout: float):
    self._client, self._me, self._count = client, process_id, num_processes
    self._heartbeat_timeout = heartbeat_timeout
    self._trace = ""
    self._leaving = threading.Event()
    global _current
    _current = self
    client.key_value_set(f"{_HOST}/{process_id}", f"{socket.gethostname()}, pid {os.getpid()}")
    self._threads = [
      threading.Thread(target=f, daemon=True, name=THREAD) for f in (self._wait_for_stop, self._count_live)
    ]
    for thread in self._threads:
      thread.start()

  def check_same_start(self, arguments: Sequence[str], versions: Sequence[str]) -> None:
    """Raises `InputError` in a process that was not started as process 0.

    Args:
      arguments: of the command line. The number of the process may differ.
      versions: of the code, in words.
    """
    own = [*(a for a in arguments if not a.lstrip("-").startswith("process_id")), *versions]
    if self._me == 0:
      self._client.key_value_set(_FLAGS, json.dumps(own))
      return
    first = json.loads(self._client.blocking_key_value_get(_FLAGS, _FOREVER))
    if own != first:
      differing = [" ".join(a for a in one if a not in other) for one, other in ((own, first), (first, own))]
      raise InputError(
        "all processes must be started with the same flags and the same code: process {} has {}, process 0 has {}".format(
          self._me, *(flags or "none of that" for flags in differing)
        )
      )

  def stop(self, line: str, status: int, trace: str = "") -> NoReturn:
    """Ends all processes with exit `status` and one line that says why; this one prints `trace` above it."""
    self._trace = trace
    self._post(line, status)
    while True:  # the thread that reads it ends the process
      time.sleep(60.0)

  def leave(self) -> None:
    """The planned end: waits for all, then ends the threads. Call `jax.distributed.shutdown` next."""
    self._client.wait_at_barrier("moe_jax/end", _FOREVER)
    self._leaving.set()
    global _current
    _current = None
    self._post(None, 0)
    # The store ends with process 0, and JAX aborts a process that is still connected then.
    while self._me == 0 and len(self._live()) > 1:
      time.sleep(0.05)
    for thread in self._threads:  # one that is inside JAX when the interpreter ends would abort it
      thread.join()

  def _post(self, line: str | None, status: int) -> None:
    with contextlib.suppress(RuntimeError):  # there is a reason already, or process 0 is gone
      self._client.key_value_set(_STOP, json.dumps([self._me, line, status]))

  def _live(self) -> list[int]:
    """The processes whose heartbeats JAX receives; waits until each has asked, or counts as gone."""
    return list(self._client.get_live_nodes(list(range(self._count))))

  def _count_live(self) -> None:
    with contextlib.suppress(RuntimeError):  # process 0 is gone: the other thread notices
      while not self._leaving.wait(self._heartbeat_timeout / 4):
        if len(self._live()) < self._count and not self._leaving.is_set():
          self._post(f"no heartbeat for {self._heartbeat_timeout:g} s (--heartbeat_timeout)", 1)

  def _wait_for_stop(self) -> None:
    try:
      source, line, status = json.loads(self._read_stop())
      if line is None:
        return
      gone = self._who_does_not_answer()
    except RuntimeError as error:
      source, line, status, gone = self._me, " ".join(str(error).split())[:100], 1, [0]
    if gone and status == 1:  # what the others fail with is a consequence
      line = (
        f"{self._names(gone)} died, was killed or hangs (process {source}: {line}); all processes stop, and the same "
        "command continues from the last checkpoint"
      )
    elif source == self._me:
      sys.stderr.write(self._trace)
    else:
      line = f"{self._names([source])} stopped: {line}"
    end(line, status, seconds=1.0 if self._me == 0 else 0.0)

  def _read_stop(self) -> str:
    while True:
      try:
        return self._client.blocking_key_value_get(_STOP, _HOUR)
      except RuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
          raise

  def _who_does_not_answer(self) -> list[int]:
    """The processes whose own watch does not come here."""
    try:
      self._client.wait_at_barrier(_STOP, _ANSWER)
    except RuntimeError as error:
      if "timed out" not in str(error):
        raise
      return sorted(int(line) for line in re.findall(r"(?m)^\d+$", str(error)))
    return []

  def _names(self, processes: Iterable[int]) -> str:
    names = []
    for process in processes:
      host = ""
      with contextlib.suppress(RuntimeError):
        host = f" ({self._client.key_value_try_get(f'{_HOST}/{process}')})"
      names.append(f"process {process} of {self._count}{host}")
    return ", ".join(names)


def end(line: str, status: int, seconds: float = 0.0) -> NoReturn:
  """Prints one line, and ends the process after `seconds`, whatever its threads wait for."""
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(Exception):
      stream.flush()
  abort.write(line if status in (STOPPED_STATUS, INTERRUPTED_STATUS) else f"error: {line}")
  time.sleep(seconds)  # process 0 keeps the store: the others read it first
  os._exit(status)
