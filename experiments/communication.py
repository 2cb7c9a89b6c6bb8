"""What do routers that limit where a token may go save on the wire, and what do they change?

Question   Bytes per device, busiest link and modelled step time of routers and of expert shadowing, on one real trace.
Command    python experiments/communication.py
           python experiments/communication.py --balancers=none --output_dir=runs/communication_unbalanced
           python experiments/communication.py --trace=runs/communication/run --network_ports=node --output_dir=runs/communication_shared_ports
Hardware   two CPU cores, 2 GB; any JAX device
Minutes    about 2 on two CPU cores, most of it for the run that is recorded
Result     see docs/scaling.md, "Communication, measured"

Without --trace it first trains a small fine-grained model (32 experts, 4 per token) and records its router logits in
OUTPUT_DIR/run; a run that is there is used again. Then every router chooses experts from the same last logits, a
simulated machine (--nodes, --devices_per_node, bandwidths) holds tokens and experts in equal parts, and what travels is
counted. Routing is the recorded model's; widths (--layer_dim, --layer_expert_dim) are those of Qwen3-30B-A3B in bf16.
Writes summary.csv (a line per arm and --once_per), devices.csv and three plots.

The logits stay those of the recorded run: a model that trains with a limit would adapt to it. "Choices kept" says how
many of the unlimited choices a limit leaves, and nothing about the loss.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from absl import flags

from moe_jax import cli
from moe_jax.cluster import start as distributed
from moe_jax.errors import InputError

# Of the run that is recorded, unless flags say otherwise: as much active width per token as the default preset.
RUN = {"num_experts": 32, "num_experts_per_token": 4, "expert_dim": 32, "balancers": "switch_loss:0.01"}
RUN_STEPS = 400

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
_LAYER_DIM = flags.DEFINE_integer("layer_dim", 2048, "D of the simulated layer", lower_bound=1)
_LAYER_EXPERT_DIM = flags.DEFINE_integer("layer_expert_dim", 768, "F of the simulated layer", lower_bound=1)
flags.DEFINE_integer("nodes", 4, "of the simulated machine")
flags.DEFINE_integer("devices_per_node", 4, "of the simulated machine")
flags.DEFINE_float("local_bandwidth", 160e9, "bytes/s of a device's port inside its node, each way")
flags.DEFINE_float("network_bandwidth", 50e9, "bytes/s of a network port, each way")
flags.DEFINE_string("network_ports", "device", "device | node: what has a network port")
flags.DEFINE_float("flops", 400e12, "per second and device, in products with experts")
_NUM_STEPS = flags.DEFINE_integer("num_steps", RUN_STEPS, "of the run that is recorded", lower_bound=1)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", "runs/communication", "the folder to write")
cli.define_flags(leave_out=("num_steps", "eval_every", "eval_batches", "record_router_logits", "router"))
distributed.define_flags()
for module in (cli, distributed):
  flags.adopt_module_key_flags(module)  # shown by --help


@dataclasses.dataclass(frozen=True)
class Arm:
  """One way to serve tokens."""

  name: str
  router: str
  shadow: str = ""  # bytes | time: the rule by which hot experts are copied
  limit: int = 0  # M; 0: none


@dataclasses.dataclass(frozen=True)
class Plan:
  """All that is checked before any training or counting."""

  machine: Any
  layer: Any
  arms: list[Arm]
  routers: dict[str, Any]  # by specification
  num_experts_per_token: int
  steps_per_batch: int


def main(argv: list[str]) -> None:
  del argv
  # Imported here, so that --help and wrong flags answer at once.
  from rich.console import Console

  from moe_jax.cluster import processes

  console = Console(quiet=not processes.is_first())
  folder = pathlib.Path(_OUTPUT_DIR.value)
  plan, trace = _from_trace(_TRACE.value) if _TRACE.value else _from_run(folder / "run", console)
  with processes.first_writes("counts") as mine:  # several processes only train together
    if mine:
      _count_and_write(plan, trace, folder, console)


def _count_and_write(plan: Plan, trace: Any, folder: pathlib.Path, console: Any) -> None:
  from moe_jax.analysis.communication.report import print_tables, write_csv, write_plots

  machine, layer = plan.machine, plan.layer
  tokens = _SEQUENCES.value * trace.shape[2]
  console.print(
    f"trace: {trace.folder}, router {trace.header['router']}, balancers "
    f"{trace.header['config']['model']['moe']['balancers']} while training; {trace.shape[3]} experts\n"
    f"machine: {machine.nodes} nodes of {machine.devices_per_node} devices with {tokens} tokens each, "
    f"{layer.row_bytes / 1e3:.1f} kB per token, {layer.expert_bytes / 1e6:.1f} MB per expert",
    soft_wrap=True,
  )
  rows = _simulate(plan, trace, console)
  folder.mkdir(parents=True, exist_ok=True)
  write_csv(folder, rows)
  print_tables(rows, console)
  for path in write_plots(folder, rows):
    console.print(f"plot: {path}", soft_wrap=True)


def _from_trace(path: str) -> tuple[Plan, Any]:
  from moe_jax.analysis.replay import recorded_config
  from moe_jax.config import Config
  from moe_jax.training.router_trace import Trace

  if cli.config_from_flags() != Config():
    raise InputError(f"--trace={path}: that run is recorded already; leave out --preset and the run's flags")
  trace = Trace(path)
  return _plan(recorded_config(trace), trace.shape, len(trace)), trace


def _from_run(folder: pathlib.Path, console: Any) -> tuple[Plan, Any]:
  """Trains and records, unless that is done."""
  from moe_jax import sharding
  from moe_jax.cluster import processes
  from moe_jax.data import load_dataset
  from moe_jax.training.compiled import check_run
  from moe_jax.training.loop import Run
  from moe_jax.training.progress import TrainingProgress
  from moe_jax.training.router_trace import FOLDER, Trace

  config = _run_config()
  check_run(config, sharding.make_mesh(config.mesh))
  moe, data = config.model.moe, config.data
  shape = (config.model.num_moe_layers, data.batch_size, data.sequence_length, moe.num_experts)
  plan = _plan(moe, shape, config.train.num_steps)  # before any training: a wrong flag is answered at once
  as_json = json.loads(json.dumps(config.to_dict()))
  header = folder / FOLDER / "header.json"  # there from the run's first step on
  if header.exists() and json.loads(header.read_text())["config"] != as_json:
    raise InputError(
      f"--output_dir={folder.parent}: the run in it has another configuration; choose another folder, or count that "
      "run with --trace"
    )
  if processes.from_first((folder / "result.json").exists()):
    console.print(f"the run in {folder} is done and kept", soft_wrap=True)
  else:
    with TrainingProgress(config.train.num_steps, console) as progress:
      Run(config, load_dataset(data), folder, progress, label=moe.balancers, show="the recorded run").train()
    processes.wait_for_all("recorded")
  return plan, Trace(folder)


def _run_config() -> Any:
  config = cli.config_from_flags()
  unsaid = [] if flags.FLAGS.preset != "default" else [n for n in RUN if not flags.FLAGS[n].present]
  moe = dataclasses.replace(config.model.moe, **{name: RUN[name] for name in unsaid})
  train = dataclasses.replace(
    config.train,
    num_steps=_NUM_STEPS.value,
    record_router_logits=1,
    eval_batches=1,  # nothing here reads the validation
    checkpoint_every=config.train.checkpoint_every or 100,
  )
  return dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe), train=train).check()


def _plan(moe: Any, shape: tuple[int, int, int, int], num_steps: int) -> Plan:
  """Raises `InputError` on whatever does not fit a trace of so many steps of `shape` (R, B, L, E)."""
  from moe_jax.analysis.communication.machine import Machine
  from moe_jax.analysis.communication.simulate import ONCE_PER, Layer
  from moe_jax.ops.routing import make_router

  fields = (field.name for field in dataclasses.fields(Machine))
  machine = Machine(**{name: flags.FLAGS[name].value for name in fields})
  _, batch, _, num_experts = shape
  for mode in _ONCE_PER.value:
    if mode not in ONCE_PER:
      raise InputError(f"--once_per={mode}: must be one of {', '.join(ONCE_PER)}")
  if num_experts % machine.devices:
    raise InputError(
      f"--nodes={machine.nodes}, --devices_per_node={machine.devices_per_node}: the {machine.devices} devices cannot "
      f"hold equal parts of the {num_experts} experts"
    )
  sequences = _SEQUENCES.value * machine.devices
  if sequences % batch or sequences // batch * _NUM_BATCHES.value > num_steps:
    raise InputError(
      f"--sequences_per_device={_SEQUENCES.value}: {_NUM_BATCHES.value} simulated steps (--num_batches) of {sequences} "
      f"sequences must be whole steps of the {batch} sequences of a recorded one, of which there are {num_steps}"
    )
  k = moe.num_experts_per_token
  arms = _arms(machine, num_experts, k)
  routers = {arm.router: make_router(arm.router, num_experts, k) for arm in arms}
  for spec, router in routers.items():
    missing = [name for name in router.reads if name != "train"] + ["more logits"] * bool(
      router.num_extra_logits
    )
    if missing:
      raise InputError(f"--routers={spec}: reads {', '.join(missing)}, which a trace does not have")
  return Plan(machine, Layer(_LAYER_DIM.value, _LAYER_EXPERT_DIM.value), arms, routers, k, sequences // batch)


def _arms(machine: Any, num_experts: int, k: int) -> list[Arm]:
  if _ROUTERS.value:
    found = []
    for text in _ROUTERS.value:
      router, _, shadow = text.partition("+")
      if shadow not in ("", "shadow_bytes", "shadow_time"):
        raise InputError(f"--routers={text}: behind + comes shadow_bytes or shadow_time")
      found.append(Arm(text, router, shadow.removeprefix("shadow_")))
    return found
  try:
    limits = [int(text) for text in _LIMITS.value]
  except ValueError:
    raise InputError(f"--limits={','.join(_LIMITS.value)}: must be whole numbers") from None
  arms = [Arm("softmax_topk", "softmax_topk")]
  arms += [Arm(f"softmax+shadow_{rule}", "softmax_topk", rule) for rule in ("bytes", "time")]
  arms.append(Arm("topology_aware_topk", f"topology_aware_topk:nodes={machine.nodes}"))
  for what, groups in (("device", machine.devices), ("node", machine.nodes)):
    for limit in limits:
      if limit < 1 or limit * (num_experts // groups) < k or limit > groups:
        continue  # a token would not find its K experts; the table shows which limits there are
      # DeepSeek's group score is of two experts for nodes, and a group may have only one.
      router = f"{what}_limited_topk:groups={groups}:groups_per_token={limit}"
      arms.append(Arm(f"{what}_limited M={limit}", router, limit=limit))
  return arms


def _simulate(plan: Plan, trace: Any, console: Any) -> list[dict[str, Any]]:
  """A row per arm and `once_per`: means over layers and simulated steps."""
  from rich.progress import track

  from moe_jax.analysis.communication.simulate import mean_summary

  found: dict[tuple[Arm, str], list[dict[str, Any]]] = {}
  jobs = list(_batches(plan, trace))
  for logits_TE, mask_T in track(jobs, "counting", console=console, disable=not console.is_terminal):
    for arm, once_per, numbers in _count(plan, logits_TE, mask_T):
      found.setdefault((arm, once_per), []).append(numbers)
  return [
    {"arm": arm.name, "router": arm.router, "limit": arm.limit, "once_per": once_per, **mean_summary(several)}
    for (arm, once_per), several in found.items()
  ]


def _batches(plan: Plan, trace: Any) -> Iterator[tuple[Any, Any]]:
  """(logits_TE, mask_T) of every layer of every simulated step; tokens in order, device after device."""
  size = plan.steps_per_batch
  for start in range(len(trace) - size * _NUM_BATCHES.value, len(trace), size):
    steps = trace.read(start, start + size)
    for layer in range(trace.shape[0]):
      yield steps.logits_IRBLE[:, layer].reshape(-1, trace.shape[3]), steps.mask_IBL.reshape(-1)


def _count(plan: Plan, logits_TE: Any, mask_T: Any) -> Iterator[tuple[Arm, str, dict[str, Any]]]:
  import numpy as np

  from moe_jax.analysis.communication.simulate import choose_shadows, step_cost, summary

  routed = {spec: _route(plan, router, logits_TE, mask_T) for spec, router in plan.routers.items()}
  best_TK = np.argsort(-logits_TE, axis=1, kind="stable")[:, : plan.num_experts_per_token]
  pair = lambda token, expert: token * logits_TE.shape[1] + expert
  free_A = pair(np.arange(len(best_TK))[:, None], best_TK)[mask_T].reshape(-1)
  for arm in plan.arms:
    this = routed[arm.router]
    kept = float(np.isin(free_A, pair(this.token_A, this.expert_A)).mean())
    for once_per in _ONCE_PER.value:
      where = (this, plan.machine, plan.layer, once_per)
      shadowed = choose_shadows(*where, rule=arm.shadow) if arm.shadow else []
      numbers = summary(step_cost(*where, shadowed), plan.machine)
      yield arm, once_per, numbers | {"shadowed": len(shadowed), "choices_kept": kept}


def _route(plan: Plan, router: Any, logits_TE: Any, mask_T: Any) -> Any:
  """All tokens are one routing group: what a router limits per node or device, it limits over the whole machine."""
  import jax.numpy as jnp
  import numpy as np

  from moe_jax.analysis.communication.simulate import Routed

  static = {"train": False} if "train" in router.reads else {}
  assignment = router(jnp.asarray(logits_TE, jnp.float32), mask_T=jnp.asarray(mask_T), **static).assignment
  valid_A = np.asarray(assignment.valid_A)
  tokens, num_experts = logits_TE.shape
  return Routed(
    device_T=plan.machine.place(tokens, "tokens"),
    device_E=plan.machine.place(num_experts, "experts"),
    token_A=np.asarray(assignment.token_A)[valid_A],
    expert_A=np.asarray(assignment.expert_A)[valid_A],
  )


if __name__ == "__main__":
  cli.run(distributed.on_every_process(main))
