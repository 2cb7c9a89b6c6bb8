"""Why a run ends before its last step, and what it says then: signals, a time limit, bad numbers, lack of memory.

A signal (SIGTERM, SIGHUP, Ctrl-C) or `--max_minutes` lets the step finish. All processes agree on a step, save it, and end
with `STOPPED_STATUS`. A second signal ends the process at once, with 128 and its number. Whatever else ends a run and can
be corrected becomes one line.
"""

import errno
import os
import signal
import socket
import threading
import time
from typing import Any, Self

import jax

from moe_jax.cluster import abort, processes, watch
from moe_jax.cluster.agree import Agreement
from moe_jax.errors import STOPPED_STATUS, InputError, NonFiniteLoss

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
FIRST_SAVE = 30.0  # seconds until the first checkpoint that is due by time
_PATIENCE = 5.0  # seconds for the thread that hears
_started = time.monotonic()  # of the process, from which --max_minutes counts


class _Listener:
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


class Between(_Listener):
  """Around runs: what is on disk is whole, so SIGTERM and SIGHUP end all processes at once, with `STOPPED_STATUS`.

  That is while data are loaded, while a run is evaluated whose last step is saved, and while a report is written. A
  `Stops` inside hears instead while it trains.
  """

  signals = (signal.SIGTERM, signal.SIGHUP)

  def _heard(self, number: signal.Signals, numbers: int) -> None:
    line = f"stopped by {number.name}; what is finished is kept, and the same command continues"
    watch.stop_all(line, STOPPED_STATUS)
    watch.end(line, STOPPED_STATUS)


class Stops(_Listener):
  """Listens for reasons to stop while a run trains. A context manager.

  Args:
    max_minutes: since the start of the process; 0: no limit.
    save_minutes: between checkpoints; 0: none are due by time.
  """

  def __init__(self, max_minutes: float = 0.0, save_minutes: float = 0.0):
    self._limit = 60 * max_minutes
    self._interval = 60 * save_minutes
    self._saved = time.monotonic()
    self._wait = min(FIRST_SAVE, self._interval)  # until the next checkpoint
    self._has_step = False  # whether there is something to save

  def __enter__(self) -> Self:
    self._agreement = Agreement()
    return super().__enter__()

  def close(self) -> None:
    super().close()
    self._agreement.close()

  def _handle(self, number: int, frame: Any) -> None:
    if number == signal.SIGINT and self._has_nothing:
      raise KeyboardInterrupt

  def _heard(self, number: signal.Signals, numbers: int) -> None:
    """In a thread of its own, while the main thread may wait in C for memory, a compiler, or a process that is gone."""
    if numbers > 1:
      abort.write(f"error: a second signal, {number.name}: ended without saving")
      os._exit(128 + number)
    if self._has_nothing:
      if number == signal.SIGINT:
        return  # the handler raises KeyboardInterrupt
      abort.write(f"stopped by {number.name} before the first step; the same command continues")
      os._exit(STOPPED_STATUS)
    self._agreement.ask(number.name)

  @property
  def _has_nothing(self) -> bool:
    """Whether there is nothing to save yet, and nobody to agree with."""
    return not self._has_step and jax.process_count() == 1

  def reached(self, step: int) -> str:
    """Returns why the run stops after `step`, the same in all processes; empty: it goes on. Once for each step."""
    self._has_step = True
    if self._limit and time.monotonic() - _started > self._limit and processes.is_first():
      self._agreement.ask(f"--max_minutes={self._limit / 60:g}")
      self._limit = 0.0
    return self._agreement.reached(step)

  def ended(self) -> str:
    """Ends the listening, when the last step is saved. Returns why the run stops there, the same in all processes."""
    self.close()
    return next(filter(None, processes.from_all(self._agreement.reason)), "")

  def due(self, together: bool) -> bool:
    """Returns whether a checkpoint is due by time, the same in all processes.

    Args:
      together: whether all processes wait for this step anyway. Several look at the clock only then.
    """
    if not self._interval or not (together or jax.process_count() == 1):
      return False
    return processes.from_first(time.monotonic() - self._saved > self._wait)

  def saved(self) -> None:
    """Notes that a checkpoint was saved."""
    self._saved, self._wait = time.monotonic(), self._interval


def not_finite(show: str, step: int, what: str, good: str, learning_rate: float) -> NonFiniteLoss:
  """Returns the error of a run whose numbers are no longer finite.

  Args:
    show: the run.
    step: of the numbers.
    what: the numbers.
    good: what is kept of the run.
    learning_rate: the setting.
  """
  if step == 1:
    advice = "no update came before, so the learning rate is not the reason: look at data, initial values and objective"
  else:
    advice = f"a lower --learning_rate (now {learning_rate:g}), a longer warm-up or clipping may help, in a new folder"
  return NonFiniteLoss(f"{show or 'the run'} has {what} at step {step}; {good}; {advice}")


def in_words(
  error: BaseException, show: str, then: str = "continues from the last checkpoint, if there is one"
) -> InputError | None:
  """Returns the line for an error that the user can correct: lack of memory or of disk space; None for others.

  Args:
    error: what ended the run.
    show: the run.
    then: what the same command does next.
  """
  if isinstance(error, InputError):  # it has its line, which may tell of such an error
    return None
  text = " ".join(str(error).split())
  full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
  if full or any(
    words in text for words in ("No space left on device", "Disk quota exceeded", "File too large")
  ):
    return InputError(
      f"{show or 'the run'}: no space left to write ({text[:200]}); make room, and the same command {then}"
    )
  if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "Out of memory" in text:
    return InputError(
      f"{show or 'the run'}: out of memory ({text[:200]}); use a smaller --batch_size, more --accumulation, "
      "--remat=full, a smaller model or more devices"
    )
  return None
