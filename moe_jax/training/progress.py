"""What a run shows while it trains: a progress bar on a terminal, a line now and then elsewhere."""

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


class TrainingProgress:
  """Loss, MaxVio, speed and time left of one run after another. A context manager.

  Args:
    total_steps: of all runs together; the time left is that of the whole.
    console: where to print; None: the terminal.
  """

  def __init__(self, total_steps: int, console: Console | None = None):
    self.console = console or Console()
    self._bar = Progress(
      TextColumn("{task.description}"),
      BarColumn(bar_width=None),
      TextColumn("{task.fields[numbers]}"),
      TimeRemainingColumn(compact=True),
      console=self.console,
      disable=not self.console.is_terminal,
    )
    self._total = total_steps
    self._task = self._bar.add_task("", total=total_steps, numbers="")
    self._done_before = 0
    self._label, self._steps = "", 0
    self._last_line = 0.0
    self._started = time.monotonic()

  def __enter__(self) -> "TrainingProgress":
    self._bar.start()
    return self

  def __exit__(self, *unused_exception) -> None:
    self._bar.stop()

  def start_run(self, label: str, num_steps: int) -> None:
    """The next run of `num_steps` steps begins."""
    self._label, self._steps = label, num_steps
    self._bar.update(self._task, description=label, numbers="compiling")

  def finish_run(self) -> None:
    """The run is done; the next one counts on from here."""
    self._done_before += self._steps
    self._bar.update(self._task, completed=self._done_before)

  def update(self, step: int, loss: float, max_vio: float, tokens_per_second: float) -> None:
    """Shows the numbers of `step`; `max_vio` is the mean over layers."""
    done = self._done_before + step
    numbers = f"step {step}/{self._steps}  loss {loss:.3f}  MaxVio {max_vio:.2f}"
    if tokens_per_second:
      numbers += f"  {tokens_per_second:,.0f} tok/s"
    self._bar.update(self._task, completed=done, numbers=numbers)
    now = time.monotonic()
    due = now - self._last_line > SECONDS_BETWEEN_LINES or step == self._steps
    if not self.console.is_terminal and due:
      self._last_line = now
      left = ""
      if tokens_per_second:  # not yet at the first step, whose time is compilation
        left = f"  about {(now - self._started) * (self._total - done) / max(done, 1):.0f} s left"
      self.console.print(f"{self._label}  {numbers}{left}", soft_wrap=True, highlight=False)

  def note(self, text: str) -> None:
    """A line above the bar."""
    self.console.print(text, soft_wrap=True, highlight=False, markup=False)
