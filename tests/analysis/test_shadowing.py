"""Shadowed experts (FasterMoE, PPoPP 2022): copied where their weights are fewer bytes than their tokens."""

import itertools

import numpy as np
import pytest

from moe_jax.analysis.communication import simulate as com
from tests.analysis.routed import UNEVEN, arrows, lay


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
