"""What does imbalance cost on many devices: time, bytes and drops against MaxVio?

Question   Modelled step time of one layer, bytes and drops of three exchanges, on recorded runs with different balance.
Command    python experiments/imbalance.py
           python experiments/imbalance.py --methods=none,switch_loss:0.01 --buffer_factors=1.5 --output_dir=runs/imbalance_two
           python experiments/imbalance.py --traces=runs/imbalance/none,runs/replay/run --output_dir=runs/imbalance_traces
Hardware   two CPU cores, 2 GB; any JAX device
Minutes    about 5 on two CPU cores, most of it for the four runs that are recorded
Result     see docs/scaling.md, "What imbalance costs"

Without --traces, the script trains a small fine-grained model (32 experts, 4 per token) once with each of --methods, and
records its router logits in OUTPUT_DIR/METHOD. A finished run there is reused, and an interrupted one resumes. Steps all
over each run are laid on a simulated machine (--nodes, --devices_per_node, bandwidths), whose devices hold tokens and
experts in equal parts. Three exchanges then serve each routing: dropless, dropless with a buffer that bounds what a device
sends to another, and a capacity per sequence. Widths (--layer_dim, --layer_expert_dim) are those of Qwen3-30B-A3B in bf16.
Writes imbalance.csv (a line per trace, step, layer and exchange) and imbalance.png.

Times are lower bounds: no latency, and nothing else on the links. A dropped pair is not trained on, which the time does
not show; experiments/capacity.py measures that.
"""

import dataclasses
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from absl import flags

from moe_jax import cli, disk
from moe_jax.analysis.communication import flags as machine_flags
from moe_jax.cluster import start as distributed
from moe_jax.errors import InputError

RUN = {"num_experts": 32, "num_experts_per_token": 4, "expert_dim": 32}

_METHODS = flags.DEFINE_list(
  "methods",
  ["none", "switch_loss:0.0003", "switch_loss:0.001", "switch_loss:0.01"],
  "balancers of the runs that are recorded",
)
_TRACES = flags.DEFINE_list("traces", [], "runs with recorded router logits instead")
_BUFFERS = flags.DEFINE_list(
  "buffer_factors", ["1.25", "2"], "of a device's fair share, dropless with a buffer"
)
_CAPACITIES = flags.DEFINE_list("capacity_factors", ["1.25", "2"], "slots of an expert / (T*K/E)")
_SEQUENCES = flags.DEFINE_integer("sequences_per_device", 8, "of a simulated step", lower_bound=1)
_NUM_BATCHES = flags.DEFINE_integer("num_batches", 8, "simulated steps, evenly over the run", lower_bound=1)
_NUM_STEPS = flags.DEFINE_integer("num_steps", 400, "of the runs that are recorded", lower_bound=1)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", "runs/imbalance", "the folder to write")
_SAID_HERE = (*RUN, "balancers", "router", "num_steps", "eval_every", "eval_batches", "record_router_logits")
cli.define_flags(leave_out=_SAID_HERE)
machine_flags.define_flags()
distributed.define_flags()
for module in (cli, machine_flags, distributed):
  flags.adopt_module_key_flags(module)  # shown by --help


def main(argv: list[str]) -> None:
  del argv
  # Imported here so that --help and invalid flags respond immediately.
  from rich.console import Console

  from moe_jax.analysis.communication import imbalance_study as study
  from moe_jax.analysis.communication.imbalance import Exchange
  from moe_jax.cluster import processes

  disk.check_folder(_OUTPUT_DIR.value)
  console = Console(quiet=not processes.is_first())
  machine, layer = machine_flags.machine(), machine_flags.layer()
  exchanges = [Exchange("dropless")]
  for kind, texts in (("buffer", _BUFFERS.value), ("capacity", _CAPACITIES.value)):
    exchanges += [Exchange(kind, _number(f"{kind}_factors", text)) for text in texts]
  size = {"sequences_per_device": _SEQUENCES.value, "num_batches": _NUM_BATCHES.value}
  found: list[dict[str, Any]] = []
  for trace in _traces(lambda *run: study.check(*run, machine, **size), console):
    if processes.is_first():
      found += study.points(trace, exchanges, machine, layer, **size)
  with processes.first_writes("imbalance") as mine:  # several processes only train together
    if mine:
      study.write(pathlib.Path(_OUTPUT_DIR.value), found, console)


def _traces(check: Any, console: Any) -> Iterator[Any]:
  """Yields each trace. All are checked before the first is trained."""
  from moe_jax.analysis import recording
  from moe_jax.training.router_trace import Trace

  if _TRACES.value:
    if unread := cli.given("methods"):
      raise InputError(
        f"--traces={','.join(_TRACES.value)}: these runs are recorded already; leave out {', '.join(unread)}"
      )
    traces = [Trace(folder) for folder in _TRACES.value]
    if len({trace.folder.resolve() for trace in traces}) < len(traces):
      raise InputError(f"--traces={','.join(_TRACES.value)}: names a run twice; name each once")
    for trace in traces:
      check(recording.recorded_config(trace), trace.shape, len(trace))
    yield from traces
    return
  base = cli.config_from_flags()
  configs = {}
  for method in _METHODS.value:
    moe = dataclasses.replace(base.model.moe, balancers=method, **RUN)
    config = dataclasses.replace(base, model=dataclasses.replace(base.model, moe=moe))
    configs[method] = recording.with_recording(config, _NUM_STEPS.value)
    check(configs[method].model.moe, recording.trace_shape(configs[method]), _NUM_STEPS.value)
  for method, config in configs.items():
    folder = pathlib.Path(_OUTPUT_DIR.value) / re.sub(r"[^\w.=+-]", "_", method)
    yield recording.record(config, folder, console, show=method)


def _number(flag: str, text: str) -> float:
  try:
    return float(text)
  except ValueError:
    raise InputError(f"--{flag}={text}: not a number") from None


if __name__ == "__main__":
  cli.run(distributed.on_every_process(main))
