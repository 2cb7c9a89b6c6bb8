"""Who sends how many bytes to whom: any routing laid on a simulated machine.

Tokens live on devices, experts live on devices, and a routing says which token needs which expert. What travels
follows by counting, and with the machine's bandwidths it becomes a time.

One training step of a layer moves each row (a token's D numbers) four times: to the expert (dispatch), back
(combine), and both again with the gradients. Combine is dispatch with every arrow turned round, so over a step all
four are counted from one. Exchanges, products with experts and shadowed weights follow each other without overlap.

Axes as in `moe_jax.types`; P: devices. Of two, the first sends and the second receives.
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax.analysis.communication.machine import Machine, Traffic, busiest_link, straight
from moe_jax.errors import InputError

ONCE_PER = ("expert", "device", "node")
EXCHANGES = 4  # of each row in a training step: dispatch, combine, and the gradients of both
PRODUCTS = 3  # of each matrix with a row: forward, gradient of the row, gradient of the matrix


class Routed(NamedTuple):
  """A routing laid on a machine: which device holds each token and expert, and the (token, expert) pairs to serve."""

  device_T: np.ndarray
  device_E: np.ndarray
  token_A: np.ndarray
  expert_A: np.ndarray


@dataclasses.dataclass(frozen=True)
class Layer:
  """Sizes of the experts that the traffic is for."""

  model_dim: int
  expert_dim: int
  bytes_per_number: int = 2
  matrices: int = 3  # of an expert: gate, up, down

  @property
  def row_bytes(self) -> int:
    return self.model_dim * self.bytes_per_number

  @property
  def expert_bytes(self) -> int:
    return self.matrices * self.model_dim * self.expert_dim * self.bytes_per_number

  @property
  def flops_per_row(self) -> int:
    """Of a forward pass."""
    return 2 * self.matrices * self.model_dim * self.expert_dim


def serving_device(routed: Routed, shadowed: Collection[int] = ()) -> np.ndarray:
  """[A]: the device that serves each pair. Every device has the `shadowed` experts, so their tokens stay."""
  everywhere_E = np.isin(np.arange(len(routed.device_E)), list(shadowed))
  return np.where(
    everywhere_E[routed.expert_A], routed.device_T[routed.token_A], routed.device_E[routed.expert_A]
  )


def dispatch_rows(
  routed: Routed, machine: Machine, once_per: str = "expert", shadowed: Collection[int] = ()
) -> Traffic:
  """The rows that travel to experts.

  Args:
    once_per: how often a token's row travels. expert: once for each of its experts that lie elsewhere, as
      all-to-alls of expert inputs do. device: once to each device that holds one of them. node: once to each
      node, over the network to the device with the sender's place in that node, which forwards it inside
      (DeepSeek-V3, 2412.19437, section 3.2.2).
    shadowed: experts that every device has a copy of.

  Raises:
    InputError: an unknown `once_per`.
  """
  if once_per not in ONCE_PER:
    raise InputError(f"--once_per={once_per}: must be one of {', '.join(ONCE_PER)}")
  size = machine.devices
  pair_A = routed.token_A.astype(np.int64) * size + serving_device(routed, shadowed)
  count_TP = np.bincount(pair_A, minlength=len(routed.device_T) * size).reshape(-1, size)
  if once_per != "expert":
    count_TP = np.minimum(count_TP, 1)
  rows_PP = _sum_by(routed.device_T, count_TP, size)
  if once_per != "node":
    return straight(rows_PP, machine)
  reaches_TX = count_TP.reshape(len(count_TP), machine.nodes, -1).any(axis=2).astype(np.int64)
  return _forwarded(rows_PP, _sum_by(routed.device_T, reaches_TX, size), machine)


def _sum_by(device_T: np.ndarray, values_TX: np.ndarray, size: int) -> np.ndarray:
  """[P, X]: sums over the tokens of each device. Most entries are 0, so only the others are added up."""
  width = values_TX.shape[1]
  tokens, columns = np.nonzero(values_TX)
  places = device_T[tokens].astype(np.int64) * width + columns
  sums = np.bincount(places, weights=values_TX[tokens, columns], minlength=size * width)
  return np.rint(sums).astype(np.int64).reshape(size, width)  # exact: float64, and counts below 2**53


def _forwarded(rows_PP: np.ndarray, rows_PX: np.ndarray, machine: Machine) -> Traffic:
  """Once to each node (X), to the device of the sender's place, and from there to the devices of the node."""
  size, per_node = machine.devices, machine.devices_per_node
  network_PP, local_PP = np.zeros((2, size, size), np.int64)
  for sender in range(size):
    for node in range(machine.nodes):
      relay = node * per_node + sender % per_node  # in the sender's node: the sender
      network_PP[sender, relay] += rows_PX[sender, node] * (relay != sender)
      members = slice(node * per_node, (node + 1) * per_node)
      local_PP[relay, members] += rows_PP[sender, members]
  np.fill_diagonal(local_PP, 0)
  return Traffic(network_PP, local_PP)


def capacity_rows(
  machine: Machine, *, groups: int, num_experts: int, capacity: int, expert_parallelism: int = 0
) -> Traffic:
  """The rows of an all-to-all of whole capacity buffers, [G, E, C, D] from groups to experts: empty slots travel too.

  Args:
    expert_parallelism: neighbouring devices that hold all experts among them and exchange with each other only;
      0: all devices.

  Raises:
    InputError: groups or experts that the devices do not divide.
  """
  size = expert_parallelism or machine.devices
  for what, number, parts in (
    ("expert_parallelism", machine.devices, size),
    ("groups", groups, machine.devices),
    ("num_experts", num_experts, size),
  ):
    if number % parts:
      raise InputError(f"{what}: {number} cannot be cut into {parts} equal parts")
  block = groups // machine.devices * (num_experts // size) * capacity
  replica_P = np.arange(machine.devices) // size
  return straight(np.where(replica_P[:, None] == replica_P[None, :], block, 0), machine)


def broadcast_copies(machine: Machine, source: int) -> Traffic:
  """Copies of what `source` sends to all others: a chain through its node and then node by node, so each device
  receives once, sends at most once, and each further node is entered once. Its `reversed` is a sum into `source`."""
  home = machine.node_P[source]
  order = sorted(
    range(machine.devices), key=lambda device: (device != source, machine.node_P[device] != home, device)
  )
  copies_PP = np.zeros((machine.devices, machine.devices), np.int64)
  copies_PP[order[:-1], order[1:]] = 1
  return straight(copies_PP, machine)


class StepCost(NamedTuple):
  """One layer of one training step."""

  dispatch: Traffic  # bytes, one way
  shadow: Traffic  # bytes of shadowed experts' weights to all devices; their gradients come back the same way
  rows_P: np.ndarray  # that each device's experts work on
  exchange_seconds: float  # of all four exchanges
  compute_seconds: float  # of the device with most rows
  shadow_seconds: float  # of weights and gradients

  @property
  def total(self) -> Traffic:
    """All bytes of the step, both directions: forward, backward, weights and gradients."""
    return (self.dispatch + self.dispatch.reversed) * (EXCHANGES // 2) + self.shadow + self.shadow.reversed

  @property
  def seconds(self) -> float:
    """One after the other, without overlap."""
    return self.exchange_seconds + self.compute_seconds + self.shadow_seconds


def step_cost(
  routed: Routed, machine: Machine, layer: Layer, once_per: str = "expert", shadowed: Collection[int] = ()
) -> StepCost:
  """What one layer moves and takes in a training step. Arguments as for `dispatch_rows`."""
  dispatch = dispatch_rows(routed, machine, once_per, shadowed) * layer.row_bytes
  nothing = np.zeros((machine.devices, machine.devices), np.int64)
  shadow = Traffic(nothing, nothing)
  for expert in shadowed:
    shadow += broadcast_copies(machine, int(routed.device_E[expert])) * layer.expert_bytes
  rows_P = np.bincount(serving_device(routed, shadowed), minlength=machine.devices)
  return StepCost(
    dispatch=dispatch,
    shadow=shadow,
    rows_P=rows_P,
    exchange_seconds=EXCHANGES * busiest_link(dispatch, machine).seconds,
    compute_seconds=PRODUCTS * int(rows_P.max()) * layer.flops_per_row / machine.flops,
    shadow_seconds=2 * busiest_link(shadow, machine).seconds,
  )


def choose_shadows(
  routed: Routed, machine: Machine, layer: Layer, once_per: str = "expert", rule: str = "bytes"
) -> list[int]:
  """Dynamic shadowing of FasterMoE (He et al., PPoPP 2022): the experts that are worth a copy everywhere.

  Experts are tried from the one with most tokens to the one with fewest.

  Args:
    rule: bytes: copy an expert where all bytes of the step become fewer: those of its weights and gradients
      against those of its tokens. time: where the modelled step becomes shorter, and stop at the first that does
      not make it so, as the released code does; it also counts that the busiest device has fewer rows to work on.

  Raises:
    InputError: an unknown rule.
  """
  if rule not in ("bytes", "time"):
    raise InputError(f"shadowing by {rule}: must be bytes or time")
  price = {"bytes": lambda cost: cost.total.total, "time": lambda cost: cost.seconds}[rule]
  count_E = np.bincount(routed.expert_A, minlength=len(routed.device_E))
  chosen: list[int] = []
  best = price(step_cost(routed, machine, layer, once_per))
  for expert in np.argsort(-count_E, kind="stable"):
    now = price(step_cost(routed, machine, layer, once_per, [*chosen, int(expert)]))
    if now < best:
      chosen, best = [*chosen, int(expert)], now
    elif rule == "time":
      break
  return chosen


def summary(cost: StepCost, machine: Machine) -> dict[str, Any]:
  """Plain numbers of one layer's step. Bytes are of one dispatch unless the name says step."""
  link = busiest_link(cost.dispatch, machine)
  received_P = cost.dispatch.received_P
  return {
    "network_bytes": int(cost.dispatch.network_PP.sum()),
    "local_bytes": int(cost.dispatch.local_PP.sum()),
    "step_bytes": cost.total.total,
    "sent_bytes_P": cost.dispatch.sent_P.tolist(),
    "received_bytes_P": received_P.tolist(),
    "received_over_mean": float(
      received_P.max() / max(received_P.mean(), 1.0)
    ),  # of the device that gets most
    "busiest_link": link.name.rpartition(" ")[0],  # of which kind
    "busiest_bytes": link.bytes,
    "exchange_seconds": cost.exchange_seconds,
    "compute_seconds": cost.compute_seconds,
    "shadow_seconds": cost.shadow_seconds,
    "step_seconds": cost.seconds,
  }


def mean_summary(several: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """Means of summaries over layers and steps; of words, the one that is there most often."""

  def mean(values: list[Any]) -> Any:
    if isinstance(values[0], str):
      return max(values, key=values.count)
    return np.mean(values, axis=0).tolist()

  return {name: mean([numbers[name] for numbers in several]) for name in several[0]}
