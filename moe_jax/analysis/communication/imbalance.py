"""What imbalance costs: one routing under every way to exchange tokens, on a simulated machine.

An exchange decides what travels, which rows experts work on, and what is dropped:

- dropless: every row. The device with the most popular experts is the slowest.
- dropless with a buffer: a device sends to another at most `factor` times its fair share, and later rows drop.
- capacity: every expert has `factor` times its fair share of slots in each group. Empty slots travel, too, so the time
  does not depend on the routing. What does not fit drops.

Times are those of `simulate`: lower bounds of one layer of one training step.

Axes as in `moe_jax.types`; P: devices. Of two, the first sends and the second receives.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from moe_jax.analysis.communication.machine import Machine, Traffic, busiest_link, straight
from moe_jax.analysis.communication.simulate import EXCHANGES, PRODUCTS, Layer, Routed, capacity_rows
from moe_jax.errors import InputError
from moe_jax.ops.dispatch import expert_capacity

KINDS = ("dropless", "buffer", "capacity")


@dataclasses.dataclass(frozen=True)
class Exchange:
  """One way to exchange tokens.

  Attributes:
    kind: dropless, buffer or capacity.
    factor: of a fair share; without meaning for dropless.
  """

  kind: str
  factor: float = 0.0

  def __post_init__(self):
    if self.kind not in KINDS:
      raise InputError(f"exchange {self.kind}: must be one of {', '.join(KINDS)}")
    if self.kind != "dropless" and not (self.factor > 0 and math.isfinite(self.factor)):
      raise InputError(f"exchange {self.kind}:{self.factor:g}: the factor must be a number above 0")

  @property
  def name(self) -> str:
    return self.kind if self.kind == "dropless" else f"{self.kind} {self.factor:g}"


class Cost(NamedTuple):
  """One layer of one training step."""

  seconds: float  # four exchanges and the experts' products, one after the other
  network_bytes: int  # between nodes, of one dispatch
  dropped: float  # share of the (token, expert) pairs


def cost(
  exchange: Exchange,
  routed: Routed,
  machine: Machine,
  layer: Layer,
  *,
  group_size: int,
  num_tokens: int,
  num_experts_per_token: int,
) -> Cost:
  """Returns what `exchange` makes of a routing.

  Args:
    group_size: tokens, neighbours in order, that share the slots of an expert.
    num_tokens: that are routed, padding included: they have slots, too.
    num_experts_per_token: K, which with the tokens makes a fair share, also where a router gives a token more or fewer.
  """
  k = num_experts_per_token
  if exchange.kind == "capacity":
    return _with_capacity(exchange.factor, routed, machine, layer, group_size, num_tokens, k)
  rows_PP = _rows(routed, machine)
  sent = int(rows_PP.sum())
  if exchange.kind == "buffer":
    entries = num_tokens * k // machine.devices
    rows_PP = np.minimum(rows_PP, math.ceil(entries * exchange.factor / machine.devices))
  kept = int(rows_PP.sum())
  return _cost(straight(rows_PP, machine), rows_PP.sum(axis=0), 1 - kept / max(sent, 1), machine, layer)


def even_seconds(routed: Routed, machine: Machine, layer: Layer) -> float:
  """Returns the seconds of as many rows if every device sent and received equally many: the bound without drops."""
  share = len(routed.expert_A) / machine.devices**2
  rows_PP = np.full((machine.devices, machine.devices), share)
  return _cost(straight(rows_PP, machine), rows_PP.sum(axis=0), 0.0, machine, layer).seconds


def max_vio(count_X: np.ndarray) -> float:
  """Returns max / mean - 1 of counts, of experts or devices."""
  return float(count_X.max() / max(count_X.mean(), 1e-12) - 1)


def _with_capacity(
  factor: float, routed: Routed, machine: Machine, layer: Layer, group_size: int, num_tokens: int, k: int
) -> Cost:
  num_experts, groups = len(routed.device_E), num_tokens // group_size
  slots = expert_capacity(group_size, k, factor, num_experts)
  place_A = routed.token_A.astype(np.int64) // group_size * num_experts + routed.expert_A
  count_GE = np.bincount(place_A, minlength=groups * num_experts)
  dropped = 1 - np.minimum(count_GE, slots).sum() / max(len(place_A), 1)
  rows = capacity_rows(machine, groups=groups, num_experts=num_experts, capacity=slots)
  rows_P = np.full(machine.devices, groups * slots * num_experts // machine.devices)
  return _cost(rows, rows_P, float(dropped), machine, layer)


def _rows(routed: Routed, machine: Machine) -> np.ndarray:
  """[P, P]: rows from each device to each, those that stay included."""
  size = machine.devices
  pair_A = routed.device_T[routed.token_A].astype(np.int64) * size + routed.device_E[routed.expert_A]
  return np.bincount(pair_A, minlength=size * size).reshape(size, size)


def _cost(rows: Traffic, rows_P: np.ndarray, dropped: float, machine: Machine, layer: Layer) -> Cost:
  dispatch = rows * layer.row_bytes
  exchange = EXCHANGES * busiest_link(dispatch, machine).seconds
  compute = PRODUCTS * float(rows_P.max()) * layer.flops_per_row / machine.flops
  return Cost(exchange + compute, int(dispatch.network_PP.sum()), dropped)
