"""What the progress of runs says."""

import io
import time

from rich.console import Console

from moe_jax.training.progress import TrainingProgress


def test_the_remaining_time_counts_the_steps_that_this_process_trained(monkeypatch):
  """Two runs of 100 steps at a second a step; the first one continues from step 90."""
  clock = 0.0
  monkeypatch.setattr(time, "monotonic", lambda: clock)
  out = io.StringIO()
  with TrainingProgress(200, Console(file=out, width=200)) as progress:
    progress.start_run("a", 100, first_step=90)
    clock = 5.0
    progress.update(95, 1.0, 0.0, 10.0)
    clock = 10.0
    progress.update(100, 1.0, 0.0, 10.0)
    progress.finish_run()
    progress.start_run("b", 100)
    clock = 30.0
    progress.update(20, 1.0, 0.0, 10.0)
  lines = out.getvalue().splitlines()
  assert [line.split("about ")[-1] for line in lines] == ["100 s left", "80 s left"]
