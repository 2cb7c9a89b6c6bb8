"""How fast and how steadily does a bias balance, against its rate and the batch size?

Question   MaxVio, bias and oscillation of every method with a bias, on the same router logits, without training.
Command    python experiments/replay.py
           python experiments/replay.py --trace=runs/replay/run --methods=quantile_balancing:ema=0.9,loss_free_bias:0.01
Hardware   two CPU cores, 2 GB; any JAX device
Minutes    about 2 for the default on two free CPU cores (99 s of processor time), most of it for the recorded run
Result     see docs/LOG.md, "Replay of recorded router logits"

Without --trace, the script first trains the default model without balancing and records its router logits in
OUTPUT_DIR/run. A finished run there is reused, and an interrupted one resumes. Each method then chooses experts from
the recorded logits and moves its bias step by step. Writes summary.csv and three plots: replay_max_vio.png,
replay_bias.png, replay_oscillation.png.

The logits stay those of the recorded run, while a router that trains with a balancer adapts to it. The comparison
therefore shows how biases follow one stream of logits, and nothing about the loss. Methods that have only a loss are
rejected.
"""

import pathlib
from typing import Any

from absl import flags

from moe_jax import cli, disk
from moe_jax.cluster import start as distributed
from moe_jax.errors import InputError

_TRACE = flags.DEFINE_string(
  "trace", "", "a run with recorded router logits; empty: make one in OUTPUT_DIR/run"
)
_METHODS = flags.DEFINE_string(
  "methods",
  "all",
  "balancers with a bias, comma-separated, or all: those of the registry with their defaults",
)
_RATES = flags.DEFINE_list(
  "rates", ["0.0003", "0.001", "0.003", "0.01", "0.03"], "rates of loss_free_bias to sweep"
)
_BATCH_SIZES = flags.DEFINE_list(
  "batch_sizes", [], "sequences per update to sweep; empty: a quarter of the recorded batch to eight times it"
)
_NUM_STEPS = flags.DEFINE_integer("num_steps", 600, "of the run that is recorded", lower_bound=1)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", "runs/replay", "the folder to write")
cli.define_flags(leave_out=("num_steps", "eval_every", "eval_batches", "record_router_logits"))
distributed.define_flags()
for module in (cli, distributed):
  flags.adopt_module_key_flags(module)  # shown by --help


def main(unused_argv: list[str]) -> None:
  # Imported here so that --help and invalid flags respond immediately.
  from rich.console import Console

  from moe_jax.analysis import recording
  from moe_jax.analysis.replay import study
  from moe_jax.cluster import processes
  from moe_jax.training.router_trace import Trace

  console = Console(quiet=not processes.is_first())
  folder = pathlib.Path(_OUTPUT_DIR.value)
  disk.check_folder(folder)
  if _TRACE.value:
    if unread := cli.given():
      raise InputError(f"--trace={_TRACE.value}: that run is recorded already; leave out {', '.join(unread)}")
    trace = Trace(_TRACE.value)
    plan = _plan(recording.recorded_config(trace), trace.shape, len(trace))
  else:
    config = recording.with_recording(cli.config_from_flags(), _NUM_STEPS.value)
    # Before any training: a wrong flag is answered at once.
    plan = _plan(config.model.moe, recording.trace_shape(config), config.train.num_steps)
    trace = recording.record(config, folder / "run", console)
  with processes.first_writes("replays") as mine:  # several processes only train together
    if mine:
      study.run(plan, trace, folder, console)


def _plan(moe: Any, shape: tuple[int, int, int, int], num_steps: int) -> Any:
  from moe_jax.analysis.replay import study

  names = [name.strip() for name in _METHODS.value.split(",") if name.strip()]
  return study.make_plan(
    moe,
    shape,
    num_steps,
    methods=None if names == ["all"] else names,
    rates=[_number("rates", text, float) for text in _RATES.value],
    batch_sizes=[_number("batch_sizes", text, int) for text in _BATCH_SIZES.value],
  )


def _number(flag: str, text: str, kind: type) -> Any:
  try:
    return kind(text)
  except ValueError:
    raise InputError(f"--{flag}={text}: not a number ({kind.__name__})") from None


if __name__ == "__main__":
  cli.run(distributed.on_every_process(main))
