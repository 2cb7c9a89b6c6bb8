"""Why a run ends before its last step, and what it says then: signals, a time limit, bad numbers, lack of memory.

A signal (SIGTERM, SIGHUP, Ctrl-C) or `--max_minutes` lets the step finish. All processes agree on a step, save it, and end
with `STOPPED_STATUS`. A second signal acts as if nobody had listened. Whatever else ends a run and can be corrected
becomes one line.
"""

import os
import signal
import time
from typing import Any, Self

import jax

from moe_jax.cluster import abort, processes
from moe_jax.cluster.agree import Agreement
from moe_jax.cluster.signals import Listener
from moe_jax.errors import STOPPED_STATUS, InputError, NonFiniteLoss, of_the_disk

FIRST_SAVE = 30.0  # seconds until the first checkpoint that is due by time
_started = time.monotonic()  # of the process, from which --max_minutes counts


class Stops(Listener):
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
    self._received = 0
    self._has_step = False  # whether there is something to save

  def __enter__(self) -> Self:
    self._agreement = Agreement()
    return super().__enter__()

  def close(self) -> None:
    super().close()
    self._agreement.close()

  def _handle(self, number: int, frame: Any) -> None:
    self._received += 1
    if number == signal.SIGINT and (self._has_nothing or self._received > 1):
      raise KeyboardInterrupt

  def _heard(self, number: signal.Signals, numbers: int) -> None:
    """In a thread of its own, while the main thread may wait in C for memory, a compiler, or a process that is gone."""
    if number == signal.SIGINT and (self._has_nothing or numbers > 1):
      return  # the handler raises KeyboardInterrupt
    if self._has_nothing:
      abort.write(f"stopped by {number.name} before the first step; the same command continues")
      os._exit(STOPPED_STATUS)
    if numbers > 1:
      abort.write(f"error: a second signal, {number.name}: ended without saving")
      os._exit(128 + number)
    self._agreement.ask(number.name)

  @property
  def _has_nothing(self) -> bool:
    """Whether there is nothing to save yet, and nobody to agree with."""
    return not self._has_step and jax.process_count() == 1

  def reached(self, step: int) -> str:
    """Returns why the run stops after `step`, the same in all processes; empty: it goes on. Once for each step."""
    self._has_step = True
    return self._agreement.reached(step)

  def due(self) -> bool:
    """Returns whether a checkpoint is due by time, the same in all processes. Also looks at the time limit."""
    now = time.monotonic()
    if self._limit and now - _started > self._limit and processes.is_first():
      self._agreement.ask(f"--max_minutes={self._limit / 60:g}")
    if not self._interval:
      return False
    return processes.from_first(now - self._saved > self._wait)

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


def in_words(error: BaseException, show: str) -> InputError | None:
  """Returns the line for an error that the user can correct: lack of memory or of disk space; None for others."""
  if line := of_the_disk(error, show or "the run"):
    return line
  text = " ".join(str(error).split())
  if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "Out of memory" in text:
    return InputError(
      f"{show or 'the run'}: out of memory ({text[:200]}); use a smaller --batch_size, more --accumulation, "
      "--remat=full, a smaller model or more devices"
    )
  return None
