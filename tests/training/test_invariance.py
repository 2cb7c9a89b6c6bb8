"""A training step does not depend on how its batch is split, recomputed, looped over, distributed or padded."""

import jax
import numpy as np
import pytest

from moe_jax.config import MeshConfig
from tests import tiny


@pytest.fixture(scope="module")
def expected():
  """The step on one device, in one piece, scanned, without recomputation."""
  return tiny.one_step(tiny.CONFIG, tiny.make_batch())


def test_some_assignments_drop_and_balancers_act(expected):
  """Otherwise the tests below would compare less than they say."""
  assert np.all(expected["metrics"]["dropped_fraction"] > 0.01)
  assert np.all(expected["metrics"]["switch_loss"] > 0.05)
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(expected["balancer"]))
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(expected["gradients"]))


@pytest.mark.parametrize(
  "fields",
  [
    {"accumulation": 4},
    {"remat": "full"},
    {"remat": "dots", "accumulation": 2},
    {"scan_layers": False},
    {"mesh": MeshConfig(data=8, expert=1)},
    {"mesh": MeshConfig(data=2, expert=4), "remat": "exchange"},
    {"mesh": MeshConfig(data=1, expert=4), "accumulation": 2},
  ],
  ids=lambda fields: "-".join(f"{k}={v}" for k, v in fields.items()),
)
def test_step_is_the_same(expected, fields):
  tiny.assert_same(tiny.one_step(tiny.change(tiny.CONFIG, **fields), tiny.make_batch()), expected)


@pytest.mark.parametrize("dispatcher", ["einsum", "dropless"])
def test_step_is_the_same_with_other_dispatchers(dispatcher):
  config = tiny.change(tiny.CONFIG, dispatcher=dispatcher)
  expected = tiny.one_step(config, tiny.make_batch())
  spread = tiny.change(config, mesh=MeshConfig(data=2, expert=2), accumulation=2)
  tiny.assert_same(tiny.one_step(spread, tiny.make_batch()), expected)


def test_gshard_draws_are_the_same():
  config = tiny.change(tiny.CONFIG, router="gshard_top2", accept_leaks="gshard_top2")
  expected = tiny.one_step(config, tiny.make_batch())
  spread = tiny.change(config, mesh=MeshConfig(data=2, expert=1), accumulation=4)
  tiny.assert_same(tiny.one_step(spread, tiny.make_batch()), expected)


@pytest.mark.parametrize("router", ["expert_choice", "softmax_topk"])
def test_masked_tokens_are_the_same(router):
  """Which tokens are masked, and what a bidirectional model makes of them; padding is seen by none."""
  balancers = "z_loss:0.01" if router == "expert_choice" else "loss_free_bias:0.01"
  config = tiny.change(tiny.CONFIG, objective="masked_lm", router=router, balancers=balancers)
  batch = tiny.make_batch()
  expected = tiny.one_step(config, batch)
  spread = tiny.change(config, mesh=MeshConfig(data=2, expert=1), accumulation=4)
  batch = batch | {"tokens_BL": np.where(batch["mask_BL"], batch["tokens_BL"], 7)}
  tiny.assert_same(tiny.one_step(spread, batch), expected)


@pytest.fixture(scope="module")
def no_drops():
  """No drops and no draws: sequences do not depend on their place in the batch or on its shape."""
  return tiny.change(tiny.CONFIG, capacity_factor=8.0, jitter=0.0)


@pytest.fixture(scope="module")
def expected_without_drops(no_drops):
  return tiny.one_step(no_drops, tiny.make_batch())


def test_permuting_the_batch_changes_nothing(no_drops, expected_without_drops):
  order = np.random.default_rng(3).permutation(8)
  batch = {name: value[order] for name, value in tiny.make_batch().items()}
  tiny.assert_same(tiny.one_step(no_drops, batch), expected_without_drops)


def test_padding_rows_change_nothing(no_drops, expected_without_drops):
  batch = tiny.make_batch()
  batch = {name: np.concatenate([value, value]) for name, value in batch.items()}
  batch["mask_BL"][8:] = False
  tiny.assert_same(tiny.one_step(tiny.change(no_drops, batch_size=16), batch), expected_without_drops)


def test_padding_the_length_changes_nothing(no_drops, expected_without_drops):
  short, long = tiny.make_batch(), tiny.make_batch(length=20, seed=1)
  for name in ("tokens_BL", "targets_BL"):
    long[name][:, :16] = short[name]
  long["mask_BL"] = np.concatenate([short["mask_BL"], np.zeros((8, 4), bool)], axis=1)
  tiny.assert_same(tiny.one_step(tiny.change(no_drops, sequence_length=20), long), expected_without_drops)


def test_what_padding_holds_changes_nothing(expected):
  batch = tiny.make_batch()
  hidden = ~batch["mask_BL"]
  batch["targets_BL"] = np.where(hidden, 1, batch["targets_BL"])
  # the token of the first hidden position is the input of a hidden target: nothing real reads it
  batch["tokens_BL"] = np.where(hidden, 7, batch["tokens_BL"])
  tiny.assert_same(tiny.one_step(tiny.CONFIG, batch), expected)


def test_micro_batch_scope_is_the_exception():
  """It balances within each micro-batch by choice, so cutting the step changes what it asks for."""
  config = tiny.change(tiny.CONFIG, balancers="switch_loss:0.1:scope=micro_batch")
  whole = tiny.one_step(config, tiny.make_batch())["metrics"]
  cut = tiny.one_step(tiny.change(config, accumulation=4), tiny.make_batch())["metrics"]
  np.testing.assert_allclose(whole["loss"], cut["loss"], rtol=1e-6)
  assert np.all(cut["switch_loss"] > whole["switch_loss"] * 1.01)  # four small ones are less balanced


def test_layers_add_up():
  """So the pull on one router does not depend on how many other layers there are."""
  for layers in (2, 4):
    config = tiny.change(tiny.CONFIG, balancers="switch_loss:0.1", num_layers=layers)
    metrics = tiny.one_step(config, tiny.make_batch())["metrics"]
    assert metrics["switch_loss"].shape == (layers,)
    np.testing.assert_allclose(
      metrics["total_loss"], metrics["loss"] + metrics["switch_loss"].sum(), rtol=1e-6
    )
    assert np.all((metrics["switch_loss"] > 0.099) & (metrics["switch_loss"] < 0.2))  # 0.4 when collapsed


def test_the_checks_can_fail(expected):
  """Another batch, or another seed of the jitter, is told apart."""
  with pytest.raises(AssertionError):
    tiny.assert_same(tiny.one_step(tiny.CONFIG, tiny.make_batch(seed=1)), expected)
  with pytest.raises(AssertionError):
    tiny.assert_same(tiny.one_step(tiny.change(tiny.CONFIG, jitter=0.11), tiny.make_batch()), expected)
