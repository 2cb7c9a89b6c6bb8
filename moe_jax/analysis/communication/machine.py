"""A simulated machine: nodes of devices, what travels between them, and how long the busiest link takes.

Only numpy. Links carry both directions at once at full speed, all links work at the same time, and so an exchange
lasts as long as its busiest link. Latency and waiting are left out: times are lower bounds.

Axes as in `moe_jax.types`; P: devices. Of two, the first sends and the second receives.
"""

import dataclasses
from typing import NamedTuple, Self

import numpy as np

from moe_jax.errors import InputError

PORTS = ("device", "node")


@dataclasses.dataclass(frozen=True)
class Machine:
  """Equal nodes of equal devices, which are numbered node after node.

  Inside a node each device reaches all others through one port of `local_bandwidth`, as with NVSwitch. Between
  nodes there is a network port per device, or one that the devices of a node share. Defaults: the H800 nodes of
  DeepSeek-V3 (2412.19437, section 3.2.2: NVLink 160 GB/s, InfiniBand 50 GB/s), at about 40% of their bf16 peak.
  """

  nodes: int = 4
  devices_per_node: int = 4
  local_bandwidth: float = 160e9  # bytes/s of a device's port inside its node, each way
  network_bandwidth: float = 50e9  # bytes/s of a network port, each way
  network_ports: str = "device"  # device | node: what has a network port
  flops: float = 400e12  # per second and device, in products with experts

  def __post_init__(self):
    for name in ("nodes", "devices_per_node"):
      if getattr(self, name) < 1:
        raise InputError(f"--{name}={getattr(self, name)}: must be 1 or more")
    for name in ("local_bandwidth", "network_bandwidth", "flops"):
      if not getattr(self, name) > 0:
        raise InputError(f"--{name}={getattr(self, name)}: must be above 0")
    if self.network_ports not in PORTS:
      raise InputError(f"--network_ports={self.network_ports}: must be {' or '.join(PORTS)}")

  @property
  def devices(self) -> int:
    return self.nodes * self.devices_per_node

  @property
  def node_P(self) -> np.ndarray:
    return np.arange(self.devices) // self.devices_per_node

  def place(self, count: int, what: str) -> np.ndarray:
    """Device of each of `count` tokens or experts: equal parts in order. InputError if they are not equal."""
    if count < 1 or count % self.devices:
      raise InputError(f"{count} {what}: the {self.devices} devices cannot hold equal parts of them")
    return np.arange(count) // (count // self.devices)


@dataclasses.dataclass(frozen=True)
class Traffic:
  """What travels, in rows or in bytes. A row that is forwarded counts on each of its hops; what stays counts nowhere."""

  network_PP: np.ndarray  # between nodes
  local_PP: np.ndarray  # inside nodes

  def __add__(self, other: Self) -> Self:
    return Traffic(self.network_PP + other.network_PP, self.local_PP + other.local_PP)

  def __mul__(self, factor: int) -> Self:
    return Traffic(self.network_PP * factor, self.local_PP * factor)

  @property
  def reversed(self) -> Self:
    """The opposite direction everywhere: the combine of this dispatch."""
    return Traffic(self.network_PP.T, self.local_PP.T)

  @property
  def sent_P(self) -> np.ndarray:
    return (self.network_PP + self.local_PP).sum(axis=1)

  @property
  def received_P(self) -> np.ndarray:
    return (self.network_PP + self.local_PP).sum(axis=0)

  @property
  def total(self) -> int:
    return int(self.sent_P.sum())


def straight(rows_PP: np.ndarray, machine: Machine) -> Traffic:
  """The traffic of rows that go from sender to receiver without a stop; the diagonal stays."""
  same_node_PP = machine.node_P[:, None] == machine.node_P[None, :]
  moved_PP = rows_PP * ~np.eye(machine.devices, dtype=bool)
  return Traffic(np.where(same_node_PP, 0, moved_PP), np.where(same_node_PP, moved_PP, 0))


class Link(NamedTuple):
  """One direction of one port."""

  name: str
  bytes: int
  seconds: float


def links(traffic: Traffic, machine: Machine) -> list[Link]:
  """Every direction of every port, with its bytes (`traffic` in bytes) and the seconds that they take."""
  found = []
  for way, axis in (("out of", 1), ("into", 0)):
    local_P, network_P = traffic.local_PP.sum(axis=axis), traffic.network_PP.sum(axis=axis)
    for device, count in enumerate(local_P):
      found.append(
        Link(f"local port {way} device {device}", int(count), float(count / machine.local_bandwidth))
      )
    if machine.network_ports == "node":
      network_P = network_P.reshape(machine.nodes, -1).sum(axis=1)
    for index, count in enumerate(network_P):
      name = f"network port {way} {machine.network_ports} {index}"
      found.append(Link(name, int(count), float(count / machine.network_bandwidth)))
  return found


def busiest_link(traffic: Traffic, machine: Machine) -> Link:
  """The link that takes longest; the first of equals."""
  return max(links(traffic, machine), key=lambda link: link.seconds)
