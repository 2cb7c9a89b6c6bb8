"""How much communication do routers that limit where a token may go save, and how do they change the routing?

Question   Bytes per device, busiest link and modelled step time of routers and of expert shadowing, on one real trace.
Command    python experiments/communication.py
           python experiments/communication.py --balancers=none --output_dir=runs/communication_unbalanced
           python experiments/communication.py --trace=runs/communication/run --network_ports=node --output_dir=runs/communication_shared_ports
Hardware   two CPU cores, 2 GB; any JAX device
Minutes    about 2 on two CPU cores, most of it for the run that is recorded
Result     see docs/scaling.md, "Modelled communication"

Without --trace, the script first trains a small fine-grained model (32 experts, 4 per token) and records its router
logits in OUTPUT_DIR/run. A finished run there is reused. Every router then chooses experts from the same last logits, a
simulated machine (--nodes, --devices_per_node, bandwidths) holds tokens and experts in equal parts, and the script
counts what is sent. softmax_topk chooses as the recorded model did, unless its router does more than take the largest
logits. A run whose balancers move choices by a bias is refused: its logits alone do not say what it chose. Widths
(--layer_dim, --layer_expert_dim) are those of Qwen3-30B-A3B in bf16. Writes summary.csv (a line per arm and --once_per),
devices.csv and three plots.

The logits stay those of the recorded run, while a model that trains with a limit would adapt to it. "Choices kept" is
the share of the unlimited choices that a limit leaves. It says nothing about the loss.
"""

import dataclasses
import pathlib
from typing import Any

from absl import flags

from moe_jax import cli, disk
from moe_jax.analysis.communication import flags as machine_flags
from moe_jax.cluster import start as distributed
from moe_jax.config import Config
from moe_jax.errors import InputError

# Of the run that is recorded, unless flags say otherwise: as much active width per token as the default preset.
RUN = {"num_experts": 32, "num_experts_per_token": 4, "expert_dim": 32, "balancers": "switch_loss:0.01"}

_TRACE = flags.DEFINE_string(
  "trace", "", "a run with recorded router logits; empty: make one in OUTPUT_DIR/run"
)
_ROUTERS = flags.DEFINE_list(
  "routers",
  [],
  "routers, each with +shadow_bytes or +shadow_time behind it if hot experts are copied to all devices; empty: "
  "softmax_topk, its shadowings, topology_aware_topk, and device_limited_topk and node_limited_topk with --limits",
)
_LIMITS = flags.DEFINE_list("limits", ["1", "2", "3", "4"], "M, devices or nodes that a token may reach")
_ONCE_PER = flags.DEFINE_list(
  "once_per",
  ["expert", "device", "node"],
  "how often a token's row travels: once for each of its experts, or devices, or nodes and then on inside",
)
_SEQUENCES = flags.DEFINE_integer("sequences_per_device", 32, "of a simulated step", lower_bound=1)
_NUM_BATCHES = flags.DEFINE_integer(
  "num_batches", 2, "simulated steps, from the end of the trace", lower_bound=1
)
_NUM_STEPS = flags.DEFINE_integer("num_steps", 400, "of the run that is recorded", lower_bound=1)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", "runs/communication", "the folder to write")
cli.define_flags(leave_out=("num_steps", "eval_every", "eval_batches", "record_router_logits", "router"))
machine_flags.define_flags()
distributed.define_flags()
for module in (cli, machine_flags, distributed):
  flags.adopt_module_key_flags(module)  # shown by --help


def main(argv: list[str]) -> None:
  del argv
  # Imported here so that --help and invalid flags respond immediately.
  from rich.console import Console

  from moe_jax.analysis import recording
  from moe_jax.analysis.communication import study
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
    config = recording.with_recording(_run_config(), _NUM_STEPS.value)
    # Before any training: a wrong flag is answered at once.
    plan = _plan(config.model.moe, recording.trace_shape(config), config.train.num_steps)
    trace = recording.record(config, folder / "run", console)
  with processes.first_writes("counts") as mine:  # several processes only train together
    if mine:
      study.run(plan, trace, folder, console)


def _run_config() -> Config:
  config = cli.config_from_flags()
  unsaid = [] if flags.FLAGS.preset != "default" else [n for n in RUN if not flags.FLAGS[n].present]
  moe = dataclasses.replace(config.model.moe, **{name: RUN[name] for name in unsaid})
  return dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))


def _plan(moe: Any, shape: tuple[int, int, int, int], num_steps: int) -> Any:
  from moe_jax.analysis.communication import study

  study.check_unbiased(moe)
  machine = machine_flags.machine()
  k = moe.num_experts_per_token
  if _ROUTERS.value:
    if flags.FLAGS["limits"].present:
      disk.note("--limits has no effect with --routers")
    arms = study.named_arms(_ROUTERS.value)
  else:
    arms = study.default_arms(machine, shape[3], k, _limits())
  return study.make_plan(
    shape,
    num_steps,
    num_experts_per_token=k,
    machine=machine,
    layer=machine_flags.layer(),
    arms=arms,
    once_per=_ONCE_PER.value,
    sequences_per_device=_SEQUENCES.value,
    num_batches=_NUM_BATCHES.value,
  )


def _limits() -> list[int]:
  try:
    return [int(text) for text in _LIMITS.value]
  except ValueError:
    raise InputError(f"--limits={','.join(_LIMITS.value)}: must be whole numbers") from None


if __name__ == "__main__":
  cli.run(distributed.on_every_process(main))
