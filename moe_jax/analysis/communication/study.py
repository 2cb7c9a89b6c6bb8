"""The communication study: routers and shadowings of one recorded run, laid on one simulated machine.

All tokens of a simulated step are one routing group: what a router limits per node or device, it limits over the
whole machine.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.analysis.communication import report
from moe_jax.analysis.communication.machine import Machine
from moe_jax.analysis.communication.simulate import (
  ONCE_PER,
  Layer,
  Routed,
  choose_shadows,
  mean_summary,
  step_cost,
  summary,
)
from moe_jax.analysis.recording import has_bias
from moe_jax.config import MoEConfig, spec_text
from moe_jax.errors import InputError
from moe_jax.nn.build import naming, routed_layer
from moe_jax.nn.routers import Router
from moe_jax.training.router_trace import Trace
from moe_jax.types import RouterContext

SHADOWINGS = ("bytes", "time")


@dataclasses.dataclass(frozen=True)
class Arm:
  """One way to serve tokens."""

  name: str
  router: str
  shadow: str = ""  # bytes | time: the rule by which hot experts are copied
  limit: int = 0  # devices or nodes that a token may reach; 0: no limit


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is counted, checked before any training or counting."""

  machine: Machine
  layer: Layer
  arms: Sequence[Arm]
  routers: Mapping[str, Any]  # by specification
  once_per: Sequence[str]
  num_experts_per_token: int
  sequences_per_device: int
  num_batches: int  # simulated steps, from the end of the trace
  steps_per_batch: int  # recorded steps of a simulated one


def make_plan(
  shape: tuple[int, int, int, int],
  num_steps: int,
  *,
  num_experts_per_token: int,
  machine: Machine,
  layer: Layer,
  arms: Sequence[Arm],
  once_per: Sequence[str],
  sequences_per_device: int,
  num_batches: int,
) -> Plan:
  """Checks a study of a trace of `num_steps` steps of `shape` (R, B, L, E) that may not exist yet.

  Raises:
    InputError: what does not fit the trace or the machine, or a router that reads what a trace does not have.
  """
  _, batch, _, num_experts = shape
  for mode in once_per:
    if mode not in ONCE_PER:
      raise InputError(f"--once_per={mode}: must be one of {', '.join(ONCE_PER)}")
  check_experts(machine, num_experts)
  sequences = sequences_per_device * machine.devices
  if sequences % batch or sequences // batch * num_batches > num_steps:
    raise InputError(
      f"--sequences_per_device={sequences_per_device}: {num_batches} simulated steps (--num_batches) of {sequences} "
      f"sequences must be whole steps of the {batch} sequences of a recorded one, of which there are {num_steps}"
    )
  k = num_experts_per_token
  routers = {arm.router: make_router(arm.router, num_experts, k) for arm in arms}
  return Plan(
    machine, layer, arms, routers, once_per, k, sequences_per_device, num_batches, sequences // batch
  )


def check_unbiased(moe: MoEConfig) -> None:
  """Raises `InputError` if a bias moved the choices of a recorded run: the arms choose by its logits alone."""
  if has_bias(moe):
    raise InputError(
      f"--balancers={spec_text(moe.balancers)}: moves choices by a bias, which the logits of a run do not have; take a "
      "run with a loss, or experiments/imbalance.py"
    )


def check_experts(machine: Machine, num_experts: int) -> None:
  """Raises `InputError` unless the devices hold equal parts of the experts."""
  if num_experts % machine.devices:
    raise InputError(
      f"--nodes={machine.nodes}, --devices_per_node={machine.devices_per_node}: the {machine.devices} devices cannot "
      f"hold equal parts of the {num_experts} experts"
    )


def named_arms(names: Sequence[str]) -> list[Arm]:
  """Routers, each with `+shadow_bytes` or `+shadow_time` behind it if hot experts are copied to all devices.

  Raises:
    InputError: something else behind the +.
  """
  found = []
  for text in names:
    router, _, shadow = text.partition("+")
    if shadow not in ("", *(f"shadow_{rule}" for rule in SHADOWINGS)):
      raise InputError(f"--routers={text}: behind + comes shadow_bytes or shadow_time")
    found.append(Arm(text, router, shadow.removeprefix("shadow_")))
  return found


def default_arms(
  machine: Machine, num_experts: int, num_experts_per_token: int, limits: Sequence[int]
) -> list[Arm]:
  """The plain router, its shadowings, the topology-aware router, and those that limit devices or nodes.

  Limits under which a token would not find its K experts, or above the number of devices or nodes, are left out.
  """
  arms = [Arm("softmax_topk", "softmax_topk")]
  arms += [Arm(f"softmax+shadow_{rule}", "softmax_topk", rule) for rule in SHADOWINGS]
  arms.append(Arm("topology_aware_topk", f"topology_aware_topk:nodes={machine.nodes}"))
  for what, groups in (("device", machine.devices), ("node", machine.nodes)):
    for limit in limits:
      if limit < 1 or limit * (num_experts // groups) < num_experts_per_token or limit > groups:
        continue
      # DeepSeek's group score is of two experts for nodes, and a group may have only one.
      router = f"{what}_limited_topk:groups={groups}:groups_per_token={limit}"
      arms.append(Arm(f"{what}_limited M={limit}", router, limit=limit))
  return arms


def run(plan: Plan, trace: Trace, folder: pathlib.Path, console: Any) -> None:
  """Counts the plan; writes summary.csv, devices.csv and the plots into `folder` and prints the tables."""
  machine, layer = plan.machine, plan.layer
  console.print(
    f"trace: {trace.folder}, router {trace.header['router']}, balancers "
    f"{trace.header['moe']['balancers']} while training; {trace.shape[3]} experts\n"
    f"machine: {machine.nodes} nodes of {machine.devices_per_node} devices with "
    f"{plan.sequences_per_device * trace.shape[2]} tokens each, "
    f"{layer.row_bytes / 1e3:.1f} kB per token, {layer.expert_bytes / 1e6:.1f} MB per expert",
    soft_wrap=True,
  )
  rows = simulate(plan, trace, console)
  folder.mkdir(parents=True, exist_ok=True)
  report.write_csv(folder, rows)
  report.print_tables(rows, console)
  for path in report.write_plots(folder, rows):
    console.print(f"plot: {path}", soft_wrap=True)


def simulate(plan: Plan, trace: Trace, console: Any) -> list[dict[str, Any]]:
  """A row per arm and `once_per`: means over layers and simulated steps."""
  from rich.progress import track

  found: dict[tuple[Arm, str], list[dict[str, Any]]] = {}
  jobs = list(_batches(plan, trace))
  for logits_TE, mask_T in track(jobs, "counting", console=console, disable=not console.is_terminal):
    for arm, once_per, numbers in _count(plan, logits_TE, mask_T):
      found.setdefault((arm, once_per), []).append(numbers)
  return [
    {"arm": arm.name, "router": arm.router, "limit": arm.limit, "once_per": once_per, **mean_summary(several)}
    for (arm, once_per), several in found.items()
  ]


def _batches(plan: Plan, trace: Trace) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """(logits_TE, mask_T) of every layer of every simulated step; tokens in order, device after device."""
  size = plan.steps_per_batch
  for start in range(len(trace) - size * plan.num_batches, len(trace), size):
    steps = trace.read(start, start + size)
    for layer in range(trace.shape[0]):
      yield steps.logits_IRBLE[:, layer].reshape(-1, trace.shape[3]), steps.mask_IBL.reshape(-1)


def _count(
  plan: Plan, logits_TE: np.ndarray, mask_T: np.ndarray
) -> Iterator[tuple[Arm, str, dict[str, Any]]]:
  routed = {spec: route(plan.machine, router, logits_TE, mask_T) for spec, router in plan.routers.items()}
  best_TK = np.argsort(-logits_TE, axis=1, kind="stable")[:, : plan.num_experts_per_token]
  pair = lambda token, expert: token * logits_TE.shape[1] + expert
  free_A = pair(np.arange(len(best_TK))[:, None], best_TK)[mask_T].reshape(-1)
  for arm in plan.arms:
    this = routed[arm.router]
    kept = float(np.isin(free_A, pair(this.token_A, this.expert_A)).mean())
    for once_per in plan.once_per:
      where = (this, plan.machine, plan.layer, once_per)
      shadowed = choose_shadows(*where, rule=arm.shadow) if arm.shadow else []
      numbers = summary(step_cost(*where, shadowed), plan.machine)
      yield arm, once_per, numbers | {"shadowed": len(shadowed), "choices_kept": kept}


def make_router(spec: str, num_experts: int, num_experts_per_token: int) -> Router:
  """The router of that name, which must need nothing but logits of as many experts as were recorded."""
  with naming("routers", spec):
    moe = MoEConfig(num_experts=num_experts, num_experts_per_token=num_experts_per_token, router=spec)
    layer = routed_layer(moe)
    if layer.num_scored_experts != num_experts:
      raise InputError(f"scores {layer.num_scored_experts} experts, and a trace has logits of {num_experts}")
    shape = jax.ShapeDtypeStruct((1, 16, num_experts), jnp.float32)
    context = RouterContext(jnp.ones((1, 16), bool))
    try:
      found = jax.eval_shape(lambda logits: layer.router.from_logits(logits, context), shape)
    except InputError as error:
      raise InputError(f"{error}, and a trace does not have it") from None
    if found is None:
      raise InputError("the router needs more than logits, and a trace does not have it")
  return layer.router


def route(machine: Machine, router: Router, logits_TE: np.ndarray, mask_T: np.ndarray) -> Routed:
  """Returns what the router chooses, tokens and experts in equal parts on the devices."""
  context = RouterContext(jnp.asarray(mask_T)[None])
  routing = router.from_logits(jnp.asarray(logits_TE, jnp.float32)[None], context)
  assignment = jax.tree.map(lambda field: np.asarray(field[0]), routing.assignment)
  tokens, num_experts = logits_TE.shape
  return Routed(
    device_T=machine.place(tokens, "tokens"),
    device_E=machine.place(num_experts, "experts"),
    token_A=assignment.token_A[assignment.valid_A],
    expert_A=assignment.expert_A[assignment.valid_A],
  )
