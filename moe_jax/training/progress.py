"""Shows the progress of training: a progress bar on a terminal, an occasional line otherwise."""

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


class TrainingProgress:
  """Shows loss, MaxVio, speed and remaining time of consecutive runs. It is a context manager.

  Args:
    total_steps: the number of steps of all runs together; the remaining time is for all of them.
    console: where to print; None: the terminal.
  """

  def __init__(self, total_steps: int, console: Console | None = None):
    self.console = console or Console()
    self._bar = Progress(
      TextColumn("{task.description}", markup=False),
      BarColumn(bar_width=None),
      TextColumn("{task.fields[numbers]}", markup=False),
      TimeRemainingColumn(compact=True),
      console=self.console,
      disable=not self.console.is_terminal,
    )
    self._total = total_steps
    self._task = self._bar.add_task("", total=total_steps, numbers="")
    self._done_before = 0  # steps of finished runs
    self._label, self._steps, self._first = "", 0, 0
    self._last_line = 0.0
    self._started = time.monotonic()

  def __enter__(self) -> "TrainingProgress":
    self._bar.start()
    return self

  def __exit__(self, *unused_exception) -> None:
    self._bar.stop()

  def start_run(self, label: str, num_steps: int, first_step: int = 0) -> None:
    """Starts the next run, which trains from `first_step` to `num_steps`. Steps before it took no time here."""
    self._label, self._steps, self._first = label, num_steps, first_step
    self._total -= first_step
    self._bar.update(self._task, description=label, numbers="compiling", total=self._total)

  def finish_run(self) -> None:
    """Ends the run. The next run continues the step count."""
    self._done_before += self._steps - self._first
    self._bar.update(self._task, completed=self._done_before)

  def update(self, step: int, loss: float, max_vio: float, tokens_per_second: float) -> None:
    """Shows the numbers of `step`; `max_vio` is the mean over layers."""
    done = self._done_before + step - self._first
    numbers = f"step {step}/{self._steps}  loss {loss:.3f}  MaxVio {max_vio:.2f}"
    if tokens_per_second:
      numbers += f"  {tokens_per_second:,.0f} tok/s"
    self._bar.update(self._task, completed=done, numbers=numbers)
    now = time.monotonic()
    due = now - self._last_line > SECONDS_BETWEEN_LINES or step == self._steps
    if not self.console.is_terminal and due:
      self._last_line = now
      left = ""
      if tokens_per_second:  # not at the first step, whose time is mostly compilation
        left = f"  about {(now - self._started) * (self._total - done) / max(done, 1):.0f} s left"
      self.console.print(f"{self._label}  {numbers}{left}", soft_wrap=True, highlight=False, markup=False)

  def note(self, text: str) -> None:
    """Prints a line above the bar."""
    self.console.print(text, soft_wrap=True, highlight=False, markup=False)
