"""Why a run ends before its last step, and what it says then: signals, a time limit, bad numbers, lack of memory.

A signal (SIGTERM, SIGHUP, Ctrl-C) or `--max_minutes` lets the step finish, and leaves an evaluation in training to the next
start. All processes agree on a step, save it, and end with `STOPPED_STATUS`. A second signal ends the process at once, with 128 and its number. Whatever else ends a run and can
be corrected becomes one line.
"""

import os
import signal
import time
from collections.abc import Mapping
from typing import Any, Self

import jax
import numpy as np

from moe_jax.cluster import abort, processes
from moe_jax.cluster.agree import Agreement
from moe_jax.cluster.signals import Listener, in_program
from moe_jax.errors import INTERRUPTED_STATUS, STOPPED_STATUS, InputError, NonFiniteLoss, of_the_disk
from moe_jax.ops.metrics import is_taken

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
    self._has_step = False  # whether there is something to save

  def __enter__(self) -> Self:
    self._in_program = in_program()
    self._agreement = Agreement()
    return super().__enter__()

  def close(self) -> None:
    super().close()
    self._agreement.close()

  def _handle(self, number: int, frame: Any) -> None:
    if number == signal.SIGINT and self._has_nothing and not self._in_program:
      raise KeyboardInterrupt

  def _heard(self, number: signal.Signals, numbers: int) -> None:
    """In a thread of its own, while the main thread may wait in C for memory, a compiler, or a process that is gone."""
    if numbers > 1:
      abort.write(f"error: a second signal, {number.name}: ended without saving")
      os._exit(128 + number)
    if self._has_nothing:
      interrupted = number == signal.SIGINT
      if interrupted and not self._in_program:
        return  # the handler raises KeyboardInterrupt
      abort.write(f"stopped by {number.name} before the first step; the same command continues")
      os._exit(INTERRUPTED_STATUS if interrupted else STOPPED_STATUS)
    self._agreement.ask(number.name)

  @property
  def _has_nothing(self) -> bool:
    """Whether there is nothing to save yet, and nobody to agree with."""
    return not self._has_step and jax.process_count() == 1

  def reached(self) -> str:
    """Returns why the run stops here, the same in all processes; empty: it goes on.

    After each step, and at each batch of an evaluation after it: at the same places in all processes. It costs no exchange.
    """
    self._has_step = True
    if self._limit and time.monotonic() - _started > self._limit and processes.is_first():
      self._agreement.ask(f"--max_minutes={self._limit / 60:g}")
      self._limit = 0.0
    return self.told()

  def told(self) -> str:
    """`reached` before the first step of a process: of signals alone, for each start must come to a step, however short its time."""
    return self._agreement.reached()

  def ended(self) -> str:
    """Ends the listening, when the last step is saved. Returns why the run stops there, the same in all processes."""
    self.close()
    return next(filter(None, processes.from_all(self._agreement.reason)), "")

  def due(self, together: bool, failed: bool = False) -> bool:
    """Returns whether a checkpoint is due, by time or because the last one has failed, the same in all processes.

    Args:
      together: whether all processes wait for this step anyway. Several look at the clock only then.
      failed: whether the save before has, as far as this process knows.
    """
    by_time = bool(self._interval) and time.monotonic() - self._saved > self._wait
    if jax.process_count() == 1:
      return by_time or failed
    if not together:
      return False
    found = processes.from_all([by_time, failed])
    return found[0][0] or any(failed for _, failed in found)

  def saved(self) -> None:
    """Notes that a checkpoint was saved."""
    self._saved, self._wait = time.monotonic(), self._interval


def numbers_of_step(metrics: Mapping[str, np.ndarray]) -> dict[str, float]:
  """Returns the numbers of a step that must be finite, by what they are called: losses and the gradient."""
  # Their sum has all of them, and is only named where it overflows.
  balancing = {f"balancing loss {name}": np.sum(x) for name, x in metrics.items() if not is_taken(name)}
  parts = {"loss": metrics["loss"], "gradient norm": metrics["grad_norm"], **balancing}
  whole = {"total loss": metrics["total_loss"]} if all(map(np.isfinite, parts.values())) else {}
  return parts | whole


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
  error: BaseException,
  show: str,
  folder: str | os.PathLike[str],
  then: str = "continues from the last checkpoint, if there is one",
) -> InputError | None:
  """Returns the line for an error that the user can correct: lack of memory or of disk space; None for others.

  Args:
    error: what ended the run.
    show: the run; empty: it has no name.
    folder: in which it writes.
    then: what the same command does next.
  """
  if isinstance(error, InputError):  # it has its line, which may tell of such an error
    return None
  if line := of_the_disk(error, f"{show}: {folder}" if show else str(folder), then):
    return line
  text = " ".join(str(error).split())
  if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "Out of memory" in text:
    return InputError(
      f"{show or 'the run'}: out of memory ({text[:200]}); use a smaller --batch_size, more --accumulation, "
      "--remat=full, a smaller model or more devices"
    )
  return None
