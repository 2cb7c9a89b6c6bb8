"""The replay study: every method with a bias at the recorded batch size, and one method over rates and batch sizes."""

import csv
import dataclasses
import math
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from moe_jax import disk
from moe_jax.analysis.replay import plots
from moe_jax.analysis.replay.replay import Replay, bias_methods, check_replay, replay
from moe_jax.comparison.report import canvas
from moe_jax.config import MoEConfig
from moe_jax.training.router_trace import Trace

SWEPT = "loss_free_bias"
TAIL = 0.25  # of the updates: what "tail" means in the table and the plots


class Job(NamedTuple):
  """One replay."""

  method: str
  batch_size: int
  piece: int  # sequences routed at a time: the same for all of a sweep, which is compiled once per rate


class Plan(NamedTuple):
  """All replays, checked."""

  methods: list[Job]  # at the recorded batch size
  sweep: dict[tuple[float, int], Job]  # `SWEPT` by (rate, batch size)


def make_plan(
  moe: MoEConfig,
  shape: tuple[int, int, int, int],
  num_steps: int,
  *,
  methods: Sequence[str] | None,
  rates: Sequence[float],
  batch_sizes: Sequence[int],
) -> Plan:
  """The replays of a trace that may not exist yet.

  Args:
    moe: the layer that is recorded.
    shape: (R, B, L, E) of a recorded step.
    num_steps: recorded.
    methods: balancers with a bias, beside `none`; None: those of the registry.
    rates: of `SWEPT`.
    batch_sizes: sequences per update; empty: a quarter of the recorded batch to eight times it.

  Raises:
    InputError: a method or batch size that cannot be replayed.
  """
  _, batch, _, num_scored = shape
  names = bias_methods(num_scored) if methods is None else methods
  sizes = sorted({*(batch_sizes or _sizes_around(batch, num_steps)), batch})
  piece = math.gcd(*sizes)
  at_batch = [Job(name, batch, batch) for name in ["none", *(name for name in names if name != "none")]]
  sweep = {(rate, size): Job(f"{SWEPT}:{rate:g}", size, piece) for rate in rates for size in sizes}
  for job in [*at_batch, *sweep.values()]:
    check_replay(dataclasses.replace(moe, balancers=job.method), shape, num_steps, job.batch_size, job.piece)
  return Plan(at_batch, sweep)


def _sizes_around(batch: int, num_steps: int) -> list[int]:
  """A quarter of the batch to eight times it, as far as the steps give eight updates."""
  smaller = [batch // n for n in (4, 2) if batch % n == 0]
  return [*smaller, *(batch * n for n in (1, 2, 4, 8) if num_steps // n >= 8 or n == 1)]


def run(plan: Plan, trace: Trace, folder: pathlib.Path, console: Any) -> None:
  """Replays the plan; writes summary.csv and three plots into `folder` and prints two tables."""
  console.print(
    f"trace: {trace.folder}, {len(trace)} steps of {trace.bytes_per_step / 1e3:.0f} kB, router "
    f"{trace.header['router']}, balancers {trace.header['moe']['balancers']} while training",
    soft_wrap=True,
  )
  started = time.monotonic()
  replays = _replay_all(trace, [*plan.methods, *plan.sweep.values()], console)
  console.print(f"{len(replays)} replays in {time.monotonic() - started:.1f} s")
  folder.mkdir(parents=True, exist_ok=True)
  _write_summary(folder / "summary.csv", replays)
  _print_methods({job.method: replays[job] for job in plan.methods}, console)
  _print_sweep({setting: replays[job] for setting, job in plan.sweep.items()}, console)
  for path in _write_plots(folder, plan, replays):
    console.print(f"plot: {path}", soft_wrap=True)


def _replay_all(trace: Trace, jobs: Sequence[Job], console: Any) -> dict[Job, Replay]:
  from rich.progress import track

  shown = track(jobs, "replaying", console=console, disable=not console.is_terminal)
  return {job: replay(trace, job.method, batch_size=job.batch_size, piece_size=job.piece) for job in shown}


def _write_summary(path: pathlib.Path, replays: Mapping[Job, Replay]) -> None:
  rows = [
    {"method": j.method, "batch_size": j.batch_size, **r.tail(TAIL)._asdict()} for j, r in replays.items()
  ]
  unique = dict.fromkeys(tuple(row.items()) for row in rows)  # a rate may be a default
  with disk.whole_text(path) as file:
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(map(dict, unique))


def _print_methods(replays: Mapping[str, Replay], console: Any) -> None:
  header = ("method", "MaxVio", "± over updates", "summed", "bias ± over updates")
  table = _table(header, f"The last {TAIL:.0%} of {len(next(iter(replays.values())).step_I)} updates")
  for method, result in replays.items():
    tail = result.tail(TAIL)
    bias = "-" if tail.bias_std is None else f"{tail.bias_std:.4f}"
    numbers = (tail.max_vio, tail.max_vio_std, tail.max_vio_summed)
    table.add_row(method, *(f"{x:.3f}" for x in numbers), bias)
  console.print(table)
  console.print(
    "MaxVio = max(load)/mean(load) - 1, mean over layers: of each update's tokens and, summed, of the tokens of all "
    "these updates. Frozen logits: in training the router would have adapted.",
    style="dim",
  )


def _print_sweep(replays: Mapping[tuple[float, int], Replay], console: Any) -> None:
  tails = {setting: result.tail(TAIL) for setting, result in replays.items()}
  sizes = sorted({size for _, size in tails})
  title = f"{SWEPT}: MaxVio ± standard deviation over the last {TAIL:.0%} of updates, by sequences per update"
  table = _table(("rate", *map(str, sizes)), title)
  for rate in dict.fromkeys(rate for rate, _ in tails):
    of_rate = [tails[rate, size] for size in sizes]
    table.add_row(f"{rate:g}", *(f"{tail.max_vio:.2f}±{tail.max_vio_std:.2f}" for tail in of_rate))
  console.print(table)


def _table(header: Sequence[str], title: str) -> Any:
  from rich import box
  from rich.table import Table

  table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
  for i, name in enumerate(header):
    table.add_column(name, justify="left" if i == 0 else "right", no_wrap=i == 0)
  return table


def _write_plots(folder: pathlib.Path, plan: Plan, replays: Mapping[Job, Replay]) -> list[pathlib.Path]:
  from matplotlib import rc_context

  methods = {job.method: replays[job] for job in plan.methods}
  tails = {setting: replays[job].tail(TAIL) for setting, job in plan.sweep.items()}
  with rc_context(canvas.RC):
    return [
      plots.plot_max_vio(folder / "replay_max_vio.png", methods),
      plots.plot_bias(folder / "replay_bias.png", methods),
      plots.plot_oscillation(folder / "replay_oscillation.png", SWEPT, tails),
    ]
