"""How fast and how steadily does a bias balance, against its rate and the batch size?

Question   MaxVio, bias and oscillation of every method with a bias, on the same router logits, without training.
Command    python experiments/replay.py
           python experiments/replay.py --trace=runs/replay/run --methods=quantile_balancing:ema=0.9,loss_free_bias:0.01
Hardware   two CPU cores, 2 GB; any JAX device
Minutes    about 2 for the default on two free CPU cores (99 s of processor time), most of it for the recorded run
Result     see docs/LOG.md, "Replay"

Without --trace it first trains the default model without balancing and records its router logits in
OUTPUT_DIR/run; a run that is there is used again, and one that was stopped goes on. Then each method chooses
experts from the recorded logits and moves its bias step by step. Writes summary.csv and three plots:
replay_max_vio.png, replay_bias.png, replay_oscillation.png.

The logits stay those of the recorded run, while a router that trains with a balancer adapts to it: this compares how
biases follow one stream of logits, and says nothing about the loss. Methods with only a loss are refused.
"""

import csv
import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Sequence
from typing import Any

from absl import flags

from moe_jax import cli
from moe_jax.cluster import start as distributed
from moe_jax.config import Config
from moe_jax.errors import InputError

RUN_STEPS = 600
SWEPT = "loss_free_bias"
TAIL = 0.25  # of the updates: what "tail" means in the table and the plots

_TRACE = flags.DEFINE_string(
  "trace", "", "a run with recorded router logits; empty: make one in OUTPUT_DIR/run"
)
_METHODS = flags.DEFINE_string(
  "methods",
  "all",
  "balancers with a bias, comma-separated, or all: those of the registry with their defaults",
)
_RATES = flags.DEFINE_list(
  "rates", ["0.0003", "0.001", "0.003", "0.01", "0.03"], f"rates of {SWEPT} to sweep"
)
_BATCH_SIZES = flags.DEFINE_list(
  "batch_sizes", [], "sequences per update to sweep; empty: a quarter of the recorded batch to eight times it"
)
_NUM_STEPS = flags.DEFINE_integer("num_steps", RUN_STEPS, "of the run that is recorded", lower_bound=1)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", "runs/replay", "the folder to write")
cli.define_flags(leave_out=("num_steps", "eval_every", "eval_batches", "record_router_logits"))
distributed.define_flags()
for module in (cli, distributed):
  flags.adopt_module_key_flags(module)  # shown by --help


@dataclasses.dataclass(frozen=True)
class Job:
  """One replay."""

  method: str
  batch_size: int
  piece: int  # sequences routed at a time: the same for all of a sweep, which is compiled once per rate


def main(unused_argv: list[str]) -> None:
  from rich.console import Console

  from moe_jax.cluster import processes

  console = Console(quiet=not processes.is_first())
  folder = pathlib.Path(_OUTPUT_DIR.value)
  if _TRACE.value:
    methods, sweep, trace = _from_trace(_TRACE.value)
  else:
    methods, sweep, trace = _from_run(folder / "run", console)
  with processes.first_writes("replays") as mine:  # several processes only train together
    if mine:
      _replay_and_write(methods, sweep, trace, folder, console)


def _replay_and_write(
  methods: list[Job], sweep: list[Job], trace: Any, folder: pathlib.Path, console: Any
) -> None:
  size = trace.bytes_per_step
  console.print(
    f"trace: {trace.folder}, {len(trace)} steps of {size / 1e3:.0f} kB, router {trace.header['router']}, "
    f"balancers {trace.header['config']['model']['moe']['balancers']} while training",
    soft_wrap=True,
  )
  started = time.monotonic()
  replays = _replay_all(trace, [*methods, *sweep], console)
  console.print(f"{len(replays)} replays in {time.monotonic() - started:.1f} s")
  folder.mkdir(parents=True, exist_ok=True)
  _write_summary(folder / "summary.csv", replays)
  _print_methods({job: replays[job] for job in methods}, console)
  _print_sweep({job: replays[job] for job in sweep}, console)
  for path in _plot(folder, methods, sweep, replays):
    console.print(f"plot: {path}", soft_wrap=True)


def _from_trace(path: str) -> tuple[list[Job], list[Job], Any]:
  from moe_jax.analysis.replay import recorded_config
  from moe_jax.training.router_trace import Trace

  if cli.config_from_flags() != Config():
    raise InputError(f"--trace={path}: that run is recorded already; leave out --preset and the run's flags")
  trace = Trace(path)
  return *_jobs(recorded_config(trace), trace.shape, len(trace)), trace


def _from_run(folder: pathlib.Path, console: Any) -> tuple[list[Job], list[Job], Any]:
  """Trains and records, unless that is done."""
  from moe_jax import sharding
  from moe_jax.cluster import processes
  from moe_jax.data import load_dataset
  from moe_jax.nn.methods import num_scored_experts
  from moe_jax.training.compiled import check_run
  from moe_jax.training.loop import Run
  from moe_jax.training.progress import TrainingProgress
  from moe_jax.training.router_trace import FOLDER, Trace

  config = cli.config_from_flags()
  train = dataclasses.replace(
    config.train,
    num_steps=_NUM_STEPS.value,
    record_router_logits=1,
    eval_batches=1,  # nothing here reads the validation
    checkpoint_every=config.train.checkpoint_every or 100,
  )
  config = dataclasses.replace(config, train=train).check()
  moe, data = config.model.moe, config.data
  check_run(config, sharding.make_mesh(config.mesh))
  shape = (config.model.num_moe_layers, data.batch_size, data.sequence_length, num_scored_experts(moe))
  jobs = _jobs(moe, shape, train.num_steps)  # before any training: a wrong flag is answered at once
  header = folder / FOLDER / "header.json"  # there from the run's first step on
  if header.exists():
    _check_same(folder, json.loads(header.read_text())["config"], config)
  if processes.from_first((folder / "result.json").exists()):
    console.print(f"the run in {folder} is done and kept", soft_wrap=True)
  else:
    with TrainingProgress(train.num_steps, console) as progress:
      Run(config, load_dataset(data), folder, progress, label=moe.balancers, show="the recorded run").train()
    processes.wait_for_all("recorded")
  return *jobs, Trace(folder)


def _check_same(folder: pathlib.Path, known: dict[str, Any], config: Config) -> None:
  for part, fields in config.to_dict().items():
    for name, value in fields.items():
      was = known.get(part, {}).get(name)
      if was != value:
        changed = ", ".join(k for k in value if value[k] != was.get(k)) if name == "moe" and was else name
        raise InputError(
          f"--output_dir={folder.parent}: the run in it has another configuration ({changed}); choose another "
          "folder, or replay that run with --trace"
        )


def _jobs(moe: Any, shape: tuple[int, int, int, int], num_steps: int) -> tuple[list[Job], list[Job]]:
  """(methods at the recorded batch size, rates at all batch sizes), all checked."""
  from moe_jax.analysis.replay import bias_methods, check_replay

  _, batch, _, num_scored = shape
  names = [name.strip() for name in _METHODS.value.split(",") if name.strip()]
  if names == ["all"]:
    names = bias_methods(num_scored)
  sizes = [_number("batch_sizes", text, int) for text in _BATCH_SIZES.value]
  sizes = sorted({*(sizes or _sizes_around(batch, num_steps)), batch})
  piece = math.gcd(*sizes)
  methods = [Job(name, batch, batch) for name in ["none", *(name for name in names if name != "none")]]
  rates = [_number("rates", text, float) for text in _RATES.value]
  sweep = [Job(f"{SWEPT}:{rate:g}", size, piece) for rate in rates for size in sizes]
  for job in [*methods, *sweep]:
    check_replay(dataclasses.replace(moe, balancers=job.method), shape, num_steps, job.batch_size, job.piece)
  return methods, sweep


def _sizes_around(batch: int, num_steps: int) -> list[int]:
  """A quarter of the batch to eight times it, as far as the steps give eight updates."""
  smaller = [batch // n for n in (4, 2) if batch % n == 0]
  return [*smaller, *(batch * n for n in (1, 2, 4, 8) if num_steps // n >= 8 or n == 1)]


def _number(flag: str, text: str, kind: type) -> Any:
  try:
    return kind(text)
  except ValueError:
    raise InputError(f"--{flag}={text}: not a number ({kind.__name__})") from None


def _replay_all(trace: Any, jobs: list[Job], console: Any) -> dict[Job, Any]:
  from rich.progress import track

  from moe_jax.analysis.replay import replay

  shown = track(jobs, "replaying", console=console, disable=not console.is_terminal)
  return {job: replay(trace, job.method, batch_size=job.batch_size, piece_size=job.piece) for job in shown}


def _write_summary(path: pathlib.Path, replays: dict[Job, Any]) -> None:
  rows = [
    {"method": j.method, "batch_size": j.batch_size, **r.tail(TAIL)._asdict()} for j, r in replays.items()
  ]
  rows = [
    dict(items) for items in dict.fromkeys(tuple(row.items()) for row in rows)
  ]  # a rate may be a default
  with path.open("w", newline="") as file:
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)


def _print_methods(replays: dict[Job, Any], console: Any) -> None:
  header = ("method", "MaxVio", "± over updates", "summed", "bias ± over updates")
  table = _table(header, f"The last {TAIL:.0%} of {len(next(iter(replays.values())).step_I)} updates")
  for job, result in replays.items():
    tail = result.tail(TAIL)
    bias = "-" if tail.bias_std is None else f"{tail.bias_std:.4f}"
    numbers = (tail.max_vio, tail.max_vio_std, tail.max_vio_summed)
    table.add_row(job.method, *(f"{x:.3f}" for x in numbers), bias)
  console.print(table)
  console.print(
    "MaxVio = max(load)/mean(load) - 1, mean over layers: of each update's tokens and, summed, of the tokens of all "
    "these updates. Frozen logits: in training the router would have adapted.",
    style="dim",
  )


def _print_sweep(replays: dict[Job, Any], console: Any) -> None:
  sizes = sorted({job.batch_size for job in replays})
  title = f"{SWEPT}: MaxVio ± standard deviation over the last {TAIL:.0%} of updates, by sequences per update"
  table = _table(("rate", *map(str, sizes)), title)
  for method in dict.fromkeys(job.method for job in replays):
    tails = {job.batch_size: r.tail(TAIL) for job, r in replays.items() if job.method == method}
    table.add_row(
      method.partition(":")[2], *(f"{tails[s].max_vio:.2f}±{tails[s].max_vio_std:.2f}" for s in sizes)
    )
  console.print(table)


def _table(header: Sequence[str], title: str) -> Any:
  from rich import box
  from rich.table import Table

  table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
  for i, name in enumerate(header):
    table.add_column(name, justify="left" if i == 0 else "right", no_wrap=i == 0)
  return table


def _plot(
  folder: pathlib.Path, methods: list[Job], sweep: list[Job], replays: dict[Job, Any]
) -> list[pathlib.Path]:
  from matplotlib import rc_context

  from moe_jax.comparison.report import canvas

  with rc_context(canvas.RC):
    return [
      _plot_max_vio(folder / "replay_max_vio.png", {job.method: replays[job] for job in methods}),
      _plot_bias(folder / "replay_bias.png", {job.method: replays[job] for job in methods}),
      _plot_oscillation(folder / "replay_oscillation.png", {job: replays[job] for job in sweep}),
    ]


def _running_mean(values: Any, width: int) -> Any:
  import numpy as np

  kernel = np.ones(width)
  return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def _plot_max_vio(path: pathlib.Path, replays: dict[str, Any]) -> pathlib.Path:
  from moe_jax.comparison.report import canvas

  figure = canvas.figure(6.4, 3.6)
  ax = figure.subplots()
  for index, (method, result) in enumerate(replays.items()):
    look = canvas.style(index)
    max_vio_I = result.max_vio_IR.mean(axis=1)
    smooth_I = _running_mean(max_vio_I, max(1, len(max_vio_I) // 40))
    ax.plot(result.step_I, max_vio_I, color=look["color"], lw=0.4, alpha=0.25)
    ax.plot(
      result.step_I, smooth_I, color=look["color"], linestyle=look["linestyle"], label=canvas.shorten(method)
    )
  ax.set_ylim(bottom=0)
  ax.set_xlabel("recorded step")
  ax.set_ylabel("MaxVio per batch, mean over layers")
  ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), borderaxespad=0.0, fontsize=8)
  return canvas.save(figure, path, "").path


def _plot_bias(path: pathlib.Path, replays: dict[str, Any]) -> pathlib.Path:
  """The last layer's bias, a line per expert and a panel per method."""
  from moe_jax.comparison.report import canvas

  shown = {method: result for method, result in replays.items() if result.bias_IRE is not None}
  columns = min(3, max(1, len(shown)))
  rows = max(1, -(-len(shown) // columns))
  figure = canvas.figure(3.0 * columns, 2.3 * rows)
  axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"wspace": 0.3, "hspace": 0.5}).ravel()
  for ax in axes[len(shown) :]:
    ax.remove()
  for ax, (method, result) in zip(axes, shown.items(), strict=False):
    for expert, bias_I in enumerate(result.bias_IRE[:, -1].T):
      ax.plot(result.step_I, bias_I, color=canvas.style(expert)["color"], lw=0.7)
    ax.set_title(canvas.shorten(method), loc="left")
    ax.set_xlabel("recorded step")
  if shown:
    axes[0].set_ylabel("bias of each expert, last layer")
  return canvas.save(figure, path, "").path


def _plot_oscillation(path: pathlib.Path, replays: dict[Job, Any]) -> pathlib.Path:
  """Mean and standard deviation of MaxVio over the tail, against rate and against batch size."""
  from moe_jax.comparison.report import canvas

  rate_of = lambda job: float(job.method.partition(":")[2])
  sides = (("rate", rate_of, lambda job: job.batch_size), ("batch size", lambda job: job.batch_size, rate_of))
  quantities = (("max_vio", "MaxVio, mean of the tail"), ("max_vio_std", "MaxVio, std over the tail"))
  figure = canvas.figure(8.0, 5.6)
  axes = figure.subplots(2, 2, gridspec_kw={"wspace": 0.25, "hspace": 0.35})
  for row, (what, along, lines) in enumerate(sides):
    other = sides[1 - row][0]
    for ax, (name, title) in zip(axes[row], quantities, strict=True):
      for index, line in enumerate(sorted({lines(job) for job in replays})):
        points = sorted(
          (along(job), getattr(r.tail(TAIL), name)) for job, r in replays.items() if lines(job) == line
        )
        look = canvas.style(index)
        ax.plot(*zip(*points, strict=True), color=look["color"], marker=look["marker"], ms=3.5,
                label=f"{other} {line:g}")  # fmt: skip
      ax.set_xscale("log")
      ticks = sorted({along(job) for job in replays})
      ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
      ax.minorticks_off()
      ax.set_ylim(bottom=0)
      ax.set_xlabel(f"{what} of {SWEPT}" if what == "rate" else "batch size, sequences per update")
      ax.set_ylabel(title)
    axes[row][-1].legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), borderaxespad=0.0, fontsize=8)
  return canvas.save(figure, path, "").path


if __name__ == "__main__":
  cli.run(distributed.on_every_process(main))
