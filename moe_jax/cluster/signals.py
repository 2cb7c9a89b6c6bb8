"""Signals that a program hears at once, also while its main thread is in C. Imports no JAX."""

import signal
import socket
import threading
from typing import Any, Self

from moe_jax.cluster import watch
from moe_jax.errors import INTERRUPTED_STATUS, STOPPED_STATUS

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
_PATIENCE = 5.0  # seconds for the thread that hears


class Listener:
  """Hears signals, also while the main thread is in C. A context manager; the inner one of two hears."""

  signals = SIGNALS

  def __enter__(self) -> Self:
    self._handlers: dict[int, Any] = {}
    self._outbox = None
    if threading.current_thread() is threading.main_thread():
      # A handler in Python runs when the main thread is back from C, which may wait for a step, or for a process that
      # is gone. The number of the signal comes through the socket at once.
      self._inbox, self._outbox = socket.socketpair()
      self._outbox.setblocking(False)
      self._wakeup = signal.set_wakeup_fd(self._outbox.fileno(), warn_on_full_buffer=False)
      self._thread = threading.Thread(target=self._listen, daemon=True)
      self._thread.start()
      for number in self.signals:
        if signal.getsignal(number) not in (signal.SIG_IGN, None):  # nohup and shells ignore some for us
          self._handlers[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *unused_exception: Any) -> None:
    self.close()

  def close(self) -> None:
    """Ends the listening: signals do again what they did before. A second call does nothing."""
    for number, handler in self._handlers.items():
      signal.signal(number, handler)
    self._handlers = {}
    if self._outbox:
      signal.set_wakeup_fd(self._wakeup)
      self._outbox.close()  # ends the thread, when it has heard what came before
      self._outbox = None
      self._thread.join(_PATIENCE)

  def _handle(self, number: int, frame: Any) -> None:
    """In the main thread, when it is back from C."""

  def _listen(self) -> None:
    numbers = 0
    while data := self._inbox.recv(1):
      if data[0] in self.signals:
        numbers += 1
        self._heard(signal.Signals(data[0]), numbers)
    self._inbox.close()

  def _heard(self, number: signal.Signals, numbers: int) -> None:
    """At once, in a thread of its own. `numbers` counts the signals."""
    raise NotImplementedError


class Between(Listener):
  """Around programs: what is on disk is whole, so SIGTERM and SIGHUP end all processes at once, with `STOPPED_STATUS`.

  That is everywhere but where a run trains: there `moe_jax.training.stops.Stops` hears instead.

  Args:
    of_program: whether Ctrl-C ends it in the same way, with `INTERRUPTED_STATUS`, also where another `Between` is inside.
      Otherwise it is Python's KeyboardInterrupt, which a notebook survives.
  """

  def __init__(self, of_program: bool = False):
    self.signals = SIGNALS if of_program or in_program() else (signal.SIGTERM, signal.SIGHUP)

  def _heard(self, number: signal.Signals, numbers: int) -> None:
    line = f"stopped by {number.name}; what is finished is kept, and the same command continues"
    status = INTERRUPTED_STATUS if number == signal.SIGINT else STOPPED_STATUS
    watch.stop_all(line, status)
    watch.end(line, status)


def in_program() -> bool:
  """Returns whether Ctrl-C ends the process at once, because a `Between` of a program hears it."""
  hears = getattr(signal.getsignal(signal.SIGINT), "__self__", None)
  return isinstance(hears, Between) and signal.SIGINT in hears.signals
