"""Traffic on simulated machines against cases counted by hand, slow loops, conservation, and compiled programs."""

import itertools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax import sharding
from moe_jax.analysis.communication import simulate as com
from moe_jax.analysis.communication.machine import Machine, busiest_link, links
from moe_jax.config import MeshConfig
from moe_jax.errors import InputError
from moe_jax.nn import Context, MoE
from moe_jax.ops.dispatch import expert_capacity
from moe_jax.ops.routing import make_choice, to_batch
from moe_jax.sharding.exchange import Shape, exchange, make_plan, ragged_arguments
from tests.ops.balancer_laws import loss_of
from tests.ops.choosing import route as choose

SMALL = Machine(nodes=2, devices_per_node=2)  # devices 0 and 1, 2 and 3
UNEVEN = Machine(nodes=3, devices_per_node=4)


def lay(machine: Machine, expert_TK, num_experts: int) -> com.Routed:
  """Tokens and experts in equal parts in order."""
  expert_TK = np.asarray(expert_TK)
  tokens, k = expert_TK.shape
  return com.Routed(
    machine.place(tokens, "tokens"),
    machine.place(num_experts, "experts"),
    np.repeat(np.arange(tokens), k),
    expert_TK.reshape(-1),
  )


def draw(machine: Machine, rng, tokens=48, experts=24, k=4) -> com.Routed:
  """K different experts per token, the first ones more often."""
  share_E = np.arange(experts, 0, -1.0) ** 2
  chosen = [rng.choice(experts, k, replace=False, p=share_E / share_E.sum()) for _ in range(tokens)]
  return lay(machine, chosen, experts)


def routed_by(machine: Machine, spec: str, logits_TE, k: int) -> com.Routed:
  """What a router chooses."""
  tokens, experts = logits_TE.shape
  assignment = choose(make_choice(spec, experts, k), jnp.asarray(logits_TE)).assignment
  valid_A = np.asarray(assignment.valid_A)
  chosen = (np.asarray(x)[valid_A] for x in (assignment.token_A, assignment.expert_A))
  return com.Routed(machine.place(tokens, "tokens"), machine.place(experts, "experts"), *chosen)


def arrows(counts_PP) -> dict:
  return {(int(p), int(q)): int(counts_PP[p, q]) for p, q in np.argwhere(counts_PP)}


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


# Shadowing


def hot(machine, rng, share=0.6, tokens=240):
  """Top-1 of 12 experts on 12 devices; expert 7 gets `share` of the tokens."""
  expert_T = np.where(rng.random(tokens) < share, 7, rng.integers(0, 12, tokens))
  return lay(machine, expert_T[:, None], 12)


@pytest.mark.parametrize("once_per", com.ONCE_PER)
def test_a_hot_expert_is_copied_exactly_where_its_weights_are_fewer_bytes(rng, once_per):
  """K = 1: the tokens of expert 7 that leave their device, four times, against weights and gradients to 11 others."""
  routed = hot(UNEVEN, rng)
  rows = lambda shadowed: com.dispatch_rows(routed, UNEVEN, once_per, shadowed).total
  saved_rows = rows(()) - rows((7,))
  away = (routed.expert_A == 7) & (routed.device_T != 7)
  if once_per != "node":  # where some rows make two hops
    assert saved_rows == away.sum()
  # 4 * rows * D against 2 * 11 * 3 * D * F: they cost the same at F = 4 * rows / 66.
  at = 4 * saved_rows / 66
  chosen = [
    com.choose_shadows(routed, UNEVEN, com.Layer(8, expert_dim), once_per)
    for expert_dim in (int(np.ceil(at)) - 1, int(np.floor(at)) + 1)
  ]
  assert chosen == [[7], []]


def test_shadowed_tokens_stay_and_weights_travel(rng):
  routed, layer = hot(UNEVEN, rng), com.Layer(model_dim=8, expert_dim=2)
  cost = com.step_cost(routed, UNEVEN, layer, shadowed=(7,))
  others_A = routed.expert_A != 7
  others = routed._replace(token_A=routed.token_A[others_A], expert_A=routed.expert_A[others_A])
  without = com.step_cost(others, UNEVEN, layer)
  assert cost.dispatch.total == without.dispatch.total
  assert cost.rows_P.sum() == len(routed.token_A)
  assert cost.shadow.total == 11 * layer.expert_bytes
  assert cost.total.total == 4 * without.dispatch.total + 2 * 11 * layer.expert_bytes


@pytest.mark.parametrize("source", range(12))
def test_a_broadcast_reaches_every_device_once_and_enters_every_node_once(source):
  copies = com.broadcast_copies(UNEVEN, source)
  assert copies.received_P.tolist() == [int(q != source) for q in range(12)]
  assert copies.sent_P.max() == 1
  assert copies.network_PP.sum() == 2
  has = {source}
  for _ in range(11):  # whoever has it sends on
    has |= {q for p, q in itertools.chain(arrows(copies.network_PP), arrows(copies.local_PP)) if p in has}
  assert has == set(range(12))


@pytest.mark.parametrize("rule", ["bytes", "time"])
def test_shadowing_never_costs_more_and_even_loads_need_none(rng, rule):
  layer = com.Layer(model_dim=64, expert_dim=4)
  price = {"bytes": lambda cost: cost.total.total, "time": lambda cost: cost.seconds}[rule]
  routed = hot(UNEVEN, rng)
  chosen = com.choose_shadows(routed, UNEVEN, layer, rule=rule)
  assert 7 in chosen
  before, after = (price(com.step_cost(routed, UNEVEN, layer, shadowed=s)) for s in ((), chosen))
  assert after < before
  even = lay(UNEVEN, (np.arange(240) % 12)[:, None], 12)
  assert com.choose_shadows(even, UNEVEN, com.Layer(64, 64), rule=rule) == []


# What compiled programs move


def all_to_all_bytes(program: str) -> list[int]:
  """Of every all-to-all of a compiled program: the bytes of one device's result, which are those of its operand."""
  found = []
  for result in re.findall(r"= (.*?) all-to-all(?:-start)?\(", program):
    shapes = re.findall(r"(?:f32|s32)\[([\d,]*)\]", result)
    found.append(sum(4 * int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes))
  return found


@pytest.mark.parametrize(("data", "expert"), [(1, 8), (2, 4)])
@pytest.mark.parametrize("dispatcher", ["einsum", "sorted"])
def test_capacity_buffers_move_as_counted(dispatcher, data, expert):
  """Dispatch and combine of the compiled layer, byte for byte, and nothing that the routing could change."""
  batch, length, dim, experts = 16, 32, 24, 8
  moe = {"num_experts": experts, "expert_dim": 40, "dispatcher": dispatcher, "group_size": 16}
  mesh = sharding.make_mesh(MeshConfig(data=data, expert=expert))
  with jax.set_mesh(mesh):
    graphdef, params, rest = nnx.split(MoE(dim, **moe, rngs=nnx.Rngs(0)), nnx.Param, ...)
    layouts = sharding.state_shardings(mesh, params)
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    layout = sharding.batch_sharding(mesh)
    forward = lambda params, x_BLD: nnx.merge(graphdef, params, rest)(x_BLD, Context(train=True))[0]
    x = jax.ShapeDtypeStruct((batch, length, dim), jnp.float32)
    jitted = jax.jit(forward, in_shardings=(layouts, layout), out_shardings=layout)
    program = jitted.lower(params, x).compile().as_text()

  groups, capacity = batch * length // 16, expert_capacity(16, 2, 1.25, experts)
  machine = Machine(nodes=2, devices_per_node=4)
  rows = com.capacity_rows(
    machine, groups=groups, num_experts=experts, capacity=capacity, expert_parallelism=expert
  )
  if expert == 4:
    assert rows.network_PP.sum() == 0  # the exchange stays inside replicas, which are nodes here
  # Of what an instruction holds, the device's own part of 1 in `expert` stays.
  moved = [b * 8 * (expert - 1) // expert for b in all_to_all_bytes(program)]
  assert moved == [(rows * (4 * dim)).total] * 2


def test_dropless_rows_move_as_counted(rng):
  """The exchange of the dropless dispatcher: rows that arrive from elsewhere, one by one, and what is asked for them."""
  machine, dim = Machine(nodes=2, devices_per_node=4), 3
  routed = draw(machine, rng, tokens=64, experts=16, k=3)
  target_A, source_A = routed.device_E[routed.expert_A], routed.device_T[routed.token_A]
  counts_PPO = np.zeros((8, 8, 2), np.int32)
  np.add.at(counts_PPO, (source_A, target_A, routed.expert_A % 2), 1)
  here, width = 64 // 8 * 3, int(counts_PPO.sum(axis=2).max())
  rows_MD = np.repeat(1.0 + np.arange(8, dtype=np.float32), here)[:, None] * np.ones((1, dim), np.float32)

  def move(rows_MD, counts_PPO):
    plan = make_plan(counts_PPO, jax.lax.axis_index("expert"))
    _, send_size_X, _, _ = ragged_arguments(plan)
    return exchange(rows_MD, plan, Shape("expert", "padded", here, 8 * width, width)), send_size_X

  mesh = jax.make_mesh((8,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
  by_device = PartitionSpec("expert")
  moved = jax.shard_map(move, mesh=mesh, in_specs=(by_device, PartitionSpec()), out_specs=by_device)
  compiled = jax.jit(moved).lower(rows_MD, counts_PPO).compile()
  placed = (jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in
            ((rows_MD, by_device), (counts_PPO, PartitionSpec())))  # fmt: skip
  arrived_MD, send_size_X = map(np.asarray, compiled(*placed))
  sender_PM = arrived_MD[:, 0].reshape(8, -1)
  arrived_PP = (sender_PM[None] == 1.0 + np.arange(8)[:, None, None]).sum(axis=2)
  # What a device with the ragged exchange, such as a TPU, is told to send.
  asked_PP = send_size_X.reshape(8, 8, 2).sum(axis=2)
  for found_PP in (arrived_PP, asked_PP):
    np.fill_diagonal(found_PP, 0)

  traffic = com.dispatch_rows(routed, machine, "expert")
  for found_PP in (arrived_PP, asked_PP):
    np.testing.assert_array_equal(found_PP, traffic.network_PP + traffic.local_PP)
  assert traffic.total == int((source_A != target_A).sum())
  # The padded exchange moves the fullest pair's rows for every pair.
  (held,) = all_to_all_bytes(compiled.as_text())
  padded = com.capacity_rows(machine, groups=8, num_experts=8, capacity=width)
  assert held * 8 * 7 // 8 == (padded * (4 * dim)).total >= traffic.total * 4 * dim


# Wrong input


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
