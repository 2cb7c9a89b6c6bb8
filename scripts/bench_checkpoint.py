r"""What a checkpoint costs: the step that it is in, the steps beside it while it is written, and the run.

  python scripts/bench_checkpoint.py
  python scripts/bench_checkpoint.py --preset=default --cycles=20 --steps=10
  for i in $(seq 12); do python scripts/bench_checkpoint.py --cycles=0; done
  python scripts/bench_checkpoint.py --spare_cores=1      # Linux: steps leave one core to the save

Trains one model as a run does. After some steps comes the first save, and then cycles of the same number of steps, of which
every other one begins with a save, so both kinds are measured in the same minutes. Prints medians over the cycles: seconds of a
step without a save; for how long a save keeps the loop from its next step, which of several processes has the wait for the
others, too; how much longer a step takes with the save before it (one that the processes begin together may be shorter by that
wait); how much longer a cycle with a save takes, which has also what the threads take from the steps while they write; and what
that is of a run with the interval of --checkpoint_minutes. There is one first save in a start, so start it several times with
--cycles=0. Other programs on the machine count, so run it on an idle one; it prints the load.
"""

import collections
import contextlib
import os
import statistics
import tempfile
import time
from typing import Any

from absl import flags

from moe_jax import cli
from moe_jax.cluster import start
from moe_jax.errors import InputError

_CYCLES = flags.DEFINE_integer(
  "cycles", 12, "with a save, and as many without; 0: the first save only", lower_bound=0
)
_STEPS = flags.DEFINE_integer("steps", 10, "of a cycle", lower_bound=1)
_SPARE = flags.DEFINE_integer(
  "spare_cores", 0, "cores that steps leave to the save; 0: both use all", lower_bound=0
)
cli.define_flags(leave_out=("num_steps", "tensorboard", "checkpoint_every"))
start.define_flags()
for module in (cli, start):
  flags.adopt_module_key_flags(module)  # shown by --help


def compute_on_fewer_cores(spare: int) -> None:
  """Starts the threads that compute on all cores but `spare`. Threads that are started later may use all."""
  import jax

  cores = sorted(os.sched_getaffinity(0))
  if spare >= len(cores):
    raise InputError(f"--spare_cores={spare}: this process has {len(cores)}; give fewer")
  os.sched_setaffinity(0, cores[: len(cores) - spare])
  jax.devices()
  os.sched_setaffinity(0, cores)


def show_save(which: str, saves: list[float], steps_after: list[float], step: float) -> None:
  """Prints what saves cost the loop, and the steps that they are in. `step`: seconds of one without a save."""
  kept = statistics.median(saves)
  longer = statistics.median(a + b for a, b in zip(saves, steps_after, strict=True)) - step
  print(f"a {which} keeps the loop for {1e3 * kept:.1f} ms: {kept / step:+.1%} of a step")
  print(f"a step with a {which} takes longer by {1e3 * longer:.1f} ms: {longer / step:+.1%}")


def show(found: dict[str, list[float]], beside: list[list[float]], interval: float) -> None:
  """Prints medians of the seconds that were measured. `interval`: seconds between saves; 0: none are due by time."""
  early = found["step before a save"]
  before = statistics.median(early)
  print(
    f"a step before the first save: {1e3 * before:.0f} ms ({1e3 * min(early):.0f} to {1e3 * max(early):.0f})"
  )
  show_save("first save", found["first save"], found["step after the first save"], before)
  if not found["cycle"]:
    return
  step = statistics.median(found["step"])
  print(f"a step without a save: {1e3 * step:.0f} ms")
  show_save("save", found["save"], beside[0], step)
  after = [1e3 * (statistics.median(x) - step) for x in beside]
  print(f"steps after a save take longer by {', '.join(f'{ms:.0f}' for ms in after)} ms")
  more = statistics.median(a - b for a, b in zip(found["cycle with a save"], found["cycle"], strict=True))
  print(f"a cycle with a save takes {1e3 * more:.0f} ms more than one without: {more / step:+.1%} of a step")
  if interval:
    print(
      f"of a run that saves every {interval:g} s: {max(more, statistics.median(found['save'])) / interval:.2%}"
    )


class Done(Exception):
  """Everything is measured."""


def timed_run(found: dict[str, list[float]], beside: list[list[float]]) -> type:
  """Returns a kind of run whose loop is the cycles, and puts what it measures into the lists."""
  import jax

  from moe_jax.training.loop import Run

  class Timed(Run):
    def _step(self, state: Any) -> Any:
      state, metrics = self.steps.train(state, self._on_devices(next(self.batches)))
      jax.block_until_ready((state, metrics))
      return state

    def _timed_step(self, state: Any, seconds: list[float]) -> Any:
      begun = time.perf_counter()
      state = self._step(state)
      seconds.append(time.perf_counter() - begun)
      return state

    def _timed_save(self, state: Any, which: str, *rest: Any) -> None:
      begun = time.perf_counter()
      self._save(int(state.step), state, *rest, True)
      found[which].append(time.perf_counter() - begun)

    def _loop(self, state: Any, writer: Any, recorder: Any) -> Any:
      for _ in range(3):
        state = self._step(state)
      for _ in range(_STEPS.value):
        state = self._timed_step(state, found["step before a save"])
      self._timed_save(state, "first save", writer, recorder)
      state = self._timed_step(state, found["step after the first save"])
      for cycle in range(2 * _CYCLES.value):
        # `wait` would write here what a process of its own has not written yet.
        while self.checkpoints.is_saving:
          time.sleep(0.05)
        started = time.perf_counter()
        if cycle % 2:
          self._timed_save(state, "save", writer, recorder)
        for place in range(_STEPS.value):
          state = self._timed_step(state, beside[place] if cycle % 2 else found["step"])
        found["cycle with a save" if cycle % 2 else "cycle"].append(time.perf_counter() - started)
      raise Done

  return Timed


def main(argv: list[str]) -> None:
  del argv
  import dataclasses

  import jax

  if _SPARE.value:
    compute_on_fewer_cores(_SPARE.value)
  from moe_jax.cluster import processes
  from moe_jax.data import load_dataset

  found: dict[str, list[float]] = collections.defaultdict(list)
  beside: list[list[float]] = [[] for _ in range(_STEPS.value)]  # steps after a save, by their place
  config = cli.config_from_flags()
  config = dataclasses.replace(
    config, train=dataclasses.replace(config.train, num_steps=10**6, tensorboard=False)
  )
  with tempfile.TemporaryDirectory() as folder:
    folder = processes.from_first(folder)
    run = timed_run(found, beside)(config, load_dataset(config.data), folder)
    with contextlib.suppress(Done):
      run.train()
    params = sum(x.size for x in jax.tree.leaves(run.steps.abstract_state.params))
    arrays = jax.tree.leaves(run.steps.abstract_state)
    size = sum(x.size * x.dtype.itemsize for x in arrays)
  print(
    f"jax {jax.__version__}, {jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} cores, load "
    f"{os.getloadavg()[0]:.1f}; {params:,} parameters, {len(arrays)} arrays, {size / 1e6:.1f} MB; medians of "
    f"{_CYCLES.value} cycles of {_STEPS.value} steps"
  )
  show(found, beside, 60 * config.train.checkpoint_minutes)


if __name__ == "__main__":
  cli.run(start.on_every_process(main))
