"""What imbalance costs: exchanges against slow loops, their limits, and the experiment from end to end."""

import csv
import math
from fractions import Fraction

import numpy as np
import pytest
from rich.console import Console

from moe_jax.analysis.communication import imbalance, imbalance_study
from moe_jax.analysis.communication.imbalance import Exchange
from moe_jax.analysis.communication.machine import Machine
from moe_jax.analysis.communication.simulate import Layer, Routed, step_cost
from moe_jax.errors import InputError
from tests.analysis import recorded, studies

MACHINE = Machine(nodes=2, devices_per_node=2)
LAYER = Layer(model_dim=8, expert_dim=4)
TOKENS, EXPERTS, K, GROUP = 64, 8, 2, 16


def skewed(seed: int = 0, power: float = 2.0) -> Routed:
  rng = np.random.default_rng(seed)
  share_E = np.arange(EXPERTS, 0, -1.0) ** power
  chosen_TK = [rng.choice(EXPERTS, K, replace=False, p=share_E / share_E.sum()) for _ in range(TOKENS)]
  return lay(chosen_TK)


def lay(chosen_TK) -> Routed:
  chosen_TK = np.asarray(chosen_TK)
  return Routed(
    MACHINE.place(TOKENS, "tokens"),
    MACHINE.place(EXPERTS, "experts"),
    np.repeat(np.arange(TOKENS), K),
    chosen_TK.reshape(-1),
  )


def even() -> Routed:
  """Each device sends the same number of rows to each."""
  return lay([[t % EXPERTS, (t + 3) % EXPERTS] for t in range(TOKENS)])


def cost(exchange: Exchange, routed: Routed) -> imbalance.Cost:
  return imbalance.cost(
    exchange, routed, MACHINE, LAYER, group_size=GROUP, num_tokens=TOKENS, num_experts_per_token=K
  )


def test_dropless_is_the_step_of_the_communication_study():
  routed = skewed()
  expected = step_cost(routed, MACHINE, LAYER)
  found = cost(Exchange("dropless"), routed)
  assert found == (pytest.approx(expected.seconds), int(expected.dispatch.network_PP.sum()), 0.0)
  assert imbalance.even_seconds(routed, MACHINE, LAYER) < found.seconds


def test_even_routing_costs_what_even_routing_costs():
  routed = even()
  expected = imbalance.even_seconds(routed, MACHINE, LAYER)
  for exchange in (Exchange("dropless"), Exchange("buffer", 1.0), Exchange("capacity", 1.0)):
    found = cost(exchange, routed)
    assert (found.seconds, found.dropped) == (pytest.approx(expected), 0.0), exchange


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25, 4.0])
def test_a_buffer_drops_what_is_above_the_share_of_a_pair(factor):
  routed = skewed()
  room = math.ceil(TOKENS // MACHINE.devices * K * factor / MACHINE.devices)
  sent, kept = np.zeros((4, 4), int), np.zeros((4, 4), int)
  for token, expert in zip(routed.token_A, routed.expert_A, strict=True):
    p, q = token // 16, expert // 2
    sent[p, q] += 1
    kept[p, q] += sent[p, q] <= room
  found = cost(Exchange("buffer", factor), routed)
  assert found.dropped == pytest.approx(1 - kept.sum() / sent.sum())
  network = sum(kept[p, q] for p in range(4) for q in range(4) if p // 2 != q // 2) * LAYER.row_bytes
  assert found.network_bytes == network
  if factor == 4.0:  # room for all
    assert found == cost(Exchange("dropless"), routed)


@pytest.mark.parametrize("factor", [0.5, 1.25, 3.0])
def test_a_capacity_drops_what_is_above_the_slots_of_a_group(factor):
  routed = skewed()
  slots = math.ceil(Fraction(str(factor)) * GROUP * K / EXPERTS)
  used, dropped = {}, 0
  for token, expert in zip(routed.token_A, routed.expert_A, strict=True):
    place = (token // GROUP, expert)
    used[place] = used.get(place, 0) + 1
    dropped += used[place] > slots
  assert cost(Exchange("capacity", factor), routed).dropped == pytest.approx(dropped / (TOKENS * K))


def test_time_follows_balance_only_without_a_capacity():
  routings = [even(), skewed(power=1.0), skewed(power=4.0)]
  seconds = lambda exchange: [cost(exchange, routed).seconds for routed in routings]
  assert len(set(seconds(Exchange("capacity", 1.25)))) == 1
  for exchange in (Exchange("dropless"), Exchange("buffer", 2.0)):
    a, b, c = seconds(exchange)
    assert a < b < c, exchange


def test_wrong_exchanges():
  with pytest.raises(InputError, match="exchange ring: must be one of dropless, buffer, capacity"):
    Exchange("ring")
  with pytest.raises(InputError, match="exchange buffer:0: the factor must be a number above 0"):
    Exchange("buffer", 0.0)


def test_the_experiment_counts_recorded_runs(tmp_path):
  flags = [f for f in studies.TINY_RUN if not f.startswith("--num_steps")]
  flags += [
    "--num_steps=6",
    "--nodes=2",
    "--devices_per_node=2",
    "--sequences_per_device=2",
    "--num_batches=2",
  ]
  folder = tmp_path / "run"
  record = [*flags, "--methods=none", f"--output_dir={folder}"]
  again = [f"--traces={folder / 'none'}", *flags[-4:], f"--output_dir={tmp_path / 'again'}"]
  wrong = [*flags, "--buffer_factors=much", f"--output_dir={tmp_path / 'no'}"]
  uneven = [*flags, "--nodes=3", f"--output_dir={tmp_path / 'no'}"]
  ignored = [*again, "--methods=none", "--learning_rate=0.003"]  # also where a flag has its default
  twice = [f"--traces={folder / 'none'},{folder / 'none' / 'router_logits'}", *again[1:]]
  ended = studies.run("imbalance", [record, again, wrong, uneven, ignored, twice])
  assert [e.status for e in ended] == [0, 0, 2, 2, 2, 2], ended
  assert "names a run twice" in ended[5].stderr
  assert "these runs are recorded already; leave out --methods, --learning_rate\n" in ended[4].stderr
  assert "--buffer_factors=much: not a number" in ended[2].stderr
  assert "the 6 devices cannot hold equal parts of the 32 experts" in ended[3].stderr
  assert {path.name for path in folder.iterdir()} == {"none", "imbalance.csv", "imbalance.png"}
  rows = list(csv.DictReader((folder / "imbalance.csv").open()))
  assert len(rows) == 2 * 1 * 5  # simulated steps, layers, exchanges
  assert {row["trace"] for row in rows} == {str(folder / "none")}
  assert rows == list(csv.DictReader((tmp_path / "again" / "imbalance.csv").open()))
  assert not (tmp_path / "no").exists()


def points(run):
  """Of each recorded step as a simulated one."""
  steps, batch = len(run.trace), run.trace.shape[1]
  size = {"sequences_per_device": batch // MACHINE.devices, "num_batches": steps}
  return list(imbalance_study.points(run.trace, [Exchange("dropless")], MACHINE, LAYER, **size))


def test_max_vio_is_that_of_the_run_where_a_bias_moves_its_choices(tmp_path):
  run = recorded.train(tmp_path / "run", balancers="loss_free_bias:0.05", router="sigmoid_topk")
  found = [point["max_vio"] for point in points(run)]
  np.testing.assert_allclose(found, run.max_vio_IR.reshape(-1), rtol=1e-6)


def test_runs_with_the_same_balancers_have_rows_of_their_own(capsys):
  point = {"balancers": "none", "max_vio": 1.0, "max_vio_of_devices": 0.5, "exchange": "dropless"}
  point |= {"over_even": 1.0, "dropped": 0.0}
  found = [point | {"trace": "runs/a"}, point | {"trace": "runs/b", "max_vio": 3.0}]
  found.append(point | {"trace": "runs/c", "balancers": "z_loss"})
  imbalance_study.print_table(found, Console(width=120))
  lines = [line.split() for line in capsys.readouterr().out.splitlines()]
  assert ["none", "(runs/a)", "1.00", "0.50", "1.00"] in lines
  assert ["none", "(runs/b)", "3.00", "0.50", "1.00"] in lines
  assert ["z_loss", "1.00", "0.50", "1.00"] in lines
