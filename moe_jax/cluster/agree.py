"""All processes stop at one place, whichever of them was asked to: after a step, or between two batches of an evaluation.

The main threads may be at different places, and each may wait on its devices for the others. So it is threads that talk,
over the key-value store of `jax.distributed`: each says how many places its main thread has checked, while it keeps
that thread from checking another. All stop at the place after the largest, which nobody has checked. This is the protocol
of `jax.experimental.multihost_utils.reached_preemption_sync_point`, which hears SIGTERM only, and then keeps a process
from ending. `cluster.start` leaves that service off. A program that starts it by `jax.distributed.initialize` and trains in a thread,
where Python lets nobody listen for signals, is stopped by its notices; in the main thread the run hears SIGTERM itself.
"""

import contextlib
import itertools
import json
import threading
import time

import jax
from jax.experimental import multihost_utils

_POLL = 0.5  # seconds between looks for a process that was asked to stop
_PATIENCE = 30.0  # seconds in which all processes answer, or nothing is agreed on
_rounds = itertools.count()


class Agreement:
  """The place at which all processes stop. All must make and close the same agreements, in the same order."""

  def __init__(self):
    self._round = f"moe_jax/agree/{next(_rounds)}"
    self._reason = ""
    self._checked = 0  # how many places the main thread has checked
    self._stop_at: int | None = None  # at which of them all stop
    self._lock, self._closing = threading.Lock(), threading.Event()
    self._client = None
    if jax.process_count() > 1:
      from jax._src import distributed

      self._client = distributed.global_state.client
      self._thread = threading.Thread(target=self._listen, daemon=True)
      self._thread.start()

  @property
  def reason(self) -> str:
    """Why this process has been asked, or has heard that another one was; empty: it has not."""
    return self._reason

  def ask(self, reason: str) -> None:
    """Asks all processes to stop, from any thread. The first reason counts."""
    self._reason = self._reason or reason
    if self._client:
      with contextlib.suppress(Exception):  # another process was first, or process 0 is gone
        self._client.key_value_set(f"{self._round}/ask", reason)

  def reached(self) -> str:
    """Returns why all processes stop here; empty: they go on. Every process calls it at the same places, in one order."""
    with self._lock:
      self._checked += 1
      is_agreed = self._stop_at is not None and self._checked >= self._stop_at
    if _jax_was_told(self._checked):
      return "a preemption notice"
    return self._reason if is_agreed or not self._client else ""

  def close(self) -> None:
    """Call it when the last place is checked."""
    if self._client:
      self._closing.set()
      self._post()
      self._thread.join()

  def _listen(self) -> None:
    while not self._closing.wait(_POLL):
      with contextlib.suppress(Exception):
        self._reason = self._client.key_value_try_get(f"{self._round}/ask") or self._reason
        with self._lock:
          self._stop_at = self._agree()
        return

  def _post(self) -> None:
    with contextlib.suppress(Exception):  # it is posted already
      self._client.key_value_set(f"{self._round}/at/{jax.process_index()}", json.dumps(self._checked))

  def _agree(self) -> int | None:
    self._post()
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline and not self._closing.is_set():
      found = self._client.key_value_dir_get(f"{self._round}/at/")
      if len(found) == jax.process_count():
        return max(json.loads(value) for _, value in found) + 1
      time.sleep(0.05)
    return None


def _jax_was_told(place: int) -> bool:
  from jax._src import distributed

  if getattr(distributed.global_state, "preemption_sync_manager", None) is None:
    return False
  return multihost_utils.reached_preemption_sync_point(place)
