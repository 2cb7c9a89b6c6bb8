"""Traffic on simulated machines against cases counted by hand, slow loops and conservation."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.analysis.communication import simulate as com
from moe_jax.analysis.communication.machine import Machine, busiest_link, links
from moe_jax.errors import InputError
from moe_jax.ops.routing import make_choice, to_batch
from tests.analysis.routed import SMALL, UNEVEN, arrows, draw, lay
from tests.ops.balancer_laws import loss_of
from tests.ops.choosing import route as choose


def routed_by(machine: Machine, spec: str, logits_TE, k: int) -> com.Routed:
  """What a router chooses."""
  tokens, experts = logits_TE.shape
  assignment = choose(make_choice(spec, experts, k), jnp.asarray(logits_TE)).assignment
  valid_A = np.asarray(assignment.valid_A)
  chosen = (np.asarray(x)[valid_A] for x in (assignment.token_A, assignment.expert_A))
  return com.Routed(machine.place(tokens, "tokens"), machine.place(experts, "experts"), *chosen)


# Counted by hand. One token per device; expert e lies on device e.
ROUTED = lay(SMALL, [[2, 3], [1, 0], [0, 2], [0, 1]], 4)


@pytest.mark.parametrize(
  ("once_per", "network", "local"),
  [
    ("expert", {(0, 2): 1, (0, 3): 1, (2, 0): 1, (3, 0): 1, (3, 1): 1}, {(1, 0): 1}),
    ("device", {(0, 2): 1, (0, 3): 1, (2, 0): 1, (3, 0): 1, (3, 1): 1}, {(1, 0): 1}),
    # Token 0 goes to device 2 once, which forwards it to 3; token 3 to device 1, which needs it and forwards it to 0.
    ("node", {(0, 2): 1, (2, 0): 1, (3, 1): 1}, {(2, 3): 1, (1, 0): 2}),
  ],
)
def test_a_case_counted_by_hand(once_per, network, local):
  traffic = com.dispatch_rows(ROUTED, SMALL, once_per)
  assert arrows(traffic.network_PP) == network
  assert arrows(traffic.local_PP) == local


def test_two_experts_on_one_device_travel_once_if_asked():
  """Two experts per device: 0 and 1 on device 0, 2 and 3 on device 1, ..."""
  routed = lay(SMALL, [[4, 5], [0, 1], [4, 5], [6, 2]], 8)
  expert, device, node = (com.dispatch_rows(routed, SMALL, mode) for mode in com.ONCE_PER)
  assert arrows(expert.network_PP) == {(0, 2): 2, (3, 1): 1} and arrows(expert.local_PP) == {(1, 0): 2}
  for traffic in (device, node):
    assert arrows(traffic.network_PP) == {(0, 2): 1, (3, 1): 1}
    assert arrows(traffic.local_PP) == {(1, 0): 1}


def test_a_relay_that_needs_no_row_still_passes_it_on():
  routed = lay(SMALL, [[3], [1], [2], [3]], 4)  # only token 0 leaves, for device 3
  traffic = com.dispatch_rows(routed, SMALL, "node")
  assert arrows(traffic.network_PP) == {(0, 2): 1} and arrows(traffic.local_PP) == {(2, 3): 1}


def test_times_and_the_busiest_link_by_hand():
  """The rows of ROUTED, straight: device 3 sends two rows over the network, devices 0 and 3 send most."""
  machine = Machine(nodes=2, devices_per_node=2, local_bandwidth=100.0, network_bandwidth=10.0, flops=1e3)
  layer = com.Layer(model_dim=5, expert_dim=3, bytes_per_number=4)
  assert (layer.row_bytes, layer.expert_bytes, layer.flops_per_row) == (20, 180, 90)
  cost = com.step_cost(ROUTED, machine, layer)
  found = {link.name: link for link in links(cost.dispatch, machine)}
  assert found["network port out of device 3"].bytes == 40
  assert found["local port out of device 1"].seconds == pytest.approx(0.2)
  assert found["network port into device 0"].bytes == 40
  assert busiest_link(cost.dispatch, machine).seconds == pytest.approx(4.0)
  assert cost.exchange_seconds == pytest.approx(4 * 4.0)
  assert cost.rows_P.tolist() == [3, 2, 2, 1]
  assert cost.compute_seconds == pytest.approx(3 * 3 * 90 / 1e3)
  assert cost.seconds == pytest.approx(16 + 0.81)
  assert cost.total.total == 4 * 6 * 20

  # Expert 0's 180 bytes go 0 -> 1 inside, 1 -> 2 over the network, 2 -> 3 inside, and its gradients come back.
  shadowed = com.step_cost(ROUTED, machine, layer, shadowed=(0,))
  assert shadowed.shadow_seconds == pytest.approx(2 * 180 / 10)

  shared = Machine(2, 2, local_bandwidth=100.0, network_bandwidth=10.0, network_ports="node")
  link = busiest_link(cost.dispatch, shared)
  assert link.name == "network port out of node 1" and link.bytes == 60 and link.seconds == pytest.approx(6.0)


def test_capacity_buffers_by_hand():
  """Four groups, one per device, and four experts of 3 slots: each device sends 3 rows to each other one."""
  rows = com.capacity_rows(SMALL, groups=4, num_experts=4, capacity=3)
  assert rows.sent_P.tolist() == [9] * 4 and rows.network_PP.sum() == 24
  within = com.capacity_rows(SMALL, groups=8, num_experts=4, capacity=3, expert_parallelism=2)
  assert arrows(within.local_PP) == dict.fromkeys(((0, 1), (1, 0), (2, 3), (3, 2)), 2 * 2 * 3)
  assert within.network_PP.sum() == 0


def slow_rows(routed: com.Routed, machine: Machine, once_per: str, shadowed=()) -> tuple[Counter, Counter]:
  """(network, local) by following every token."""
  network, local = Counter(), Counter()
  node = lambda device: device // machine.devices_per_node

  def send(source, target):
    if source != target:
      (local if node(source) == node(target) else network)[source, target] += 1

  for token, source in enumerate(routed.device_T.tolist()):
    experts = [int(e) for t, e in zip(routed.token_A, routed.expert_A) if t == token]
    targets = [source if e in shadowed else int(routed.device_E[e]) for e in experts]
    if once_per != "expert":
      targets = sorted(set(targets))
    if once_per != "node":
      for target in targets:
        send(source, target)
      continue
    for reached in sorted({node(target) for target in targets}):
      relay = source
      if reached != node(source):
        relay = reached * machine.devices_per_node + source % machine.devices_per_node
        send(source, relay)
      for target in targets:
        if node(target) == reached:
          send(relay, target)
  return network, local


@pytest.mark.parametrize("shadowed", [(), (0, 5)])
@pytest.mark.parametrize("once_per", com.ONCE_PER)
@pytest.mark.parametrize("machine", [SMALL, UNEVEN, Machine(1, 4), Machine(4, 1)], ids=str)
def test_traffic_equals_slow_loops(rng, machine, once_per, shadowed):
  routed = draw(machine, rng)
  keep_A = rng.random(len(routed.token_A)) < 0.8  # some pairs were dropped, or are padding
  routed = routed._replace(token_A=routed.token_A[keep_A], expert_A=routed.expert_A[keep_A])
  traffic = com.dispatch_rows(routed, machine, once_per, shadowed)
  network, local = slow_rows(routed, machine, once_per, shadowed)
  assert arrows(traffic.network_PP) == dict(network)
  assert arrows(traffic.local_PP) == dict(local)


# Laws


@pytest.mark.parametrize("once_per", com.ONCE_PER)
def test_what_is_sent_is_received(rng, once_per):
  layer = com.Layer(model_dim=8, expert_dim=4)
  cost = com.step_cost(draw(UNEVEN, rng), UNEVEN, layer, once_per, shadowed=(1,))
  for traffic in (cost.dispatch, cost.shadow, cost.total):
    assert traffic.sent_P.sum() == traffic.received_P.sum() == traffic.total > 0
  # Back and forth, so over the whole step each device sends what it receives.
  np.testing.assert_array_equal(cost.total.sent_P, cost.total.received_P)
  per_link = links(cost.total, UNEVEN)
  for way in ("out of", "into"):
    assert sum(link.bytes for link in per_link if way in link.name) == cost.total.total


def test_the_fewer_copies_the_fewer_rows(rng):
  routed = draw(UNEVEN, rng)
  expert, device, node = (com.dispatch_rows(routed, UNEVEN, mode) for mode in com.ONCE_PER)
  assert expert.total > device.total  # 24 experts on 12 devices
  assert device.network_PP.sum() > node.network_PP.sum()
  reached = {(t, e // 8) for t, e in zip(routed.token_A.tolist(), routed.expert_A.tolist())}
  assert node.network_PP.sum() == sum(routed.device_T[t] // 4 != n for t, n in reached)
  # Straight or forwarded, each device gets the rows that its experts need, and relays some on top.
  assert (node.received_P >= device.received_P - device.network_PP.sum(axis=0)).all()


@pytest.mark.parametrize("limit", [1, 2, 3, 4])
@pytest.mark.parametrize("what", ["device", "node"])
def test_a_limit_bounds_what_is_sent(rng, what, limit):
  """A token reaches at most M devices, or M nodes; unlimited, some reach more wherever they can."""
  machine = Machine(nodes=4, devices_per_node=2)
  parts = machine.devices if what == "device" else machine.nodes
  logits_TE = rng.normal(size=(64, 32)).astype(np.float32)
  name = f"{what}_limited_topk:groups={parts}:groups_per_token={limit}"
  most = {}
  for spec in (name, "softmax_topk"):
    traffic = com.dispatch_rows(routed_by(machine, spec, logits_TE, 4), machine, what)
    sent_P = traffic.sent_P if what == "device" else traffic.network_PP.sum(axis=1)
    most[spec] = sent_P.max()
  tokens_per_device = 64 // machine.devices
  assert most[name] <= limit * tokens_per_device
  if limit == 1:
    assert most["softmax_topk"] > limit * tokens_per_device


def test_the_topology_aware_router_keeps_its_allowance(rng):
  logits_TE = rng.normal(size=(64, 16)).astype(np.float32)
  machine = Machine(nodes=2, devices_per_node=4)
  spec = "topology_aware_topk:nodes=2:max_remote_fraction=0.25"
  traffic = com.dispatch_rows(routed_by(machine, spec, logits_TE, 2), machine, "node")
  sent_by_node = traffic.network_PP.sum(axis=1).reshape(2, 4).sum(axis=1)
  assert sent_by_node.tolist() == [8, 8]  # a quarter of each node's 32 tokens


def test_the_communication_loss_balances_what_is_received(rng):
  """Descent on a bias of the logits: the send side is bounded by the router, the receive side by the loss."""
  devices, experts, k, limit, tokens = 4, 16, 4, 2, 512
  machine = Machine(nodes=2, devices_per_node=2)
  router = f"device_limited_topk:groups={devices}:groups_per_token={limit}"
  balancer = f"communication_loss:1.0:devices={devices}:devices_per_token={limit}:scope=global_batch"
  skew_E = np.where(np.arange(experts) < experts // devices, 1.5, 0.0)  # the first device is the favourite
  logits_TE = jnp.asarray(rng.normal(size=(tokens, experts)) + skew_E, jnp.float32)

  def loss(shift_E):
    routing = choose(make_choice(router, experts, k), logits_TE + shift_E[None])
    return loss_of(balancer, to_batch(jax.tree.map(lambda x: x[None], routing), 1, tokens, k))

  def received_over_mean(shift_E):
    routed = routed_by(machine, router, logits_TE + shift_E[None], k)
    reached = {(int(t), int(routed.device_E[e])) for t, e in zip(routed.token_A, routed.expert_A)}
    traffic = com.dispatch_rows(routed, machine, "device")
    assert traffic.sent_P.max() <= limit * tokens // devices
    assert traffic.total == sum(routed.device_T[t] != d for t, d in reached)
    return traffic.received_P.max() / traffic.received_P.mean()

  gradient = jax.jit(jax.grad(loss))
  shift_E = jnp.zeros(experts)
  before = received_over_mean(shift_E)
  for _ in range(60):
    shift_E = shift_E - 1.0 * gradient(shift_E)
  assert before > 1.5
  assert received_over_mean(shift_E) < 1.1


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: Machine(nodes=0), "--nodes=0: must be 1 or more"),
    (lambda: Machine(network_bandwidth=0.0), "--network_bandwidth=0.0: must be above 0"),
    (lambda: Machine(network_ports="rack"), "--network_ports=rack: must be device or node"),
    (lambda: SMALL.place(6, "experts"), "6 experts: the 4 devices cannot hold equal parts"),
    (
      lambda: com.dispatch_rows(ROUTED, SMALL, "rack"),
      "--once_per=rack: must be one of expert, device, node",
    ),
    (
      lambda: com.choose_shadows(ROUTED, SMALL, com.Layer(1, 1), rule="luck"),
      "by luck: must be bytes or time",
    ),
    (
      lambda: com.capacity_rows(SMALL, groups=6, num_experts=4, capacity=1),
      "6 cannot be cut into 4 equal parts",
    ),
  ],
)
def test_wrong_input_is_one_line(call, message):
  with pytest.raises(InputError, match=re.escape(message)) as caught:
    call()
  assert "\n" not in str(caught.value)
