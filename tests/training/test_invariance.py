"""A training step does not depend on how its batch is split, recomputed, looped over, distributed or padded."""

import functools

import jax
import numpy as np
import pytest

from moe_jax.config import MeshConfig
from tests import tiny

NO_DROPS = {
  "capacity_factor": 8.0,
  "jitter": 0.0,
}  # nor draws: sequences do not depend on their place in the batch


OF_MICRO_BATCHES = "switch_loss:0.1:scope=micro_batch"


def step(batch=None, **fields):
  """Without `fields`: on one device, in one piece, scanned, with nothing recomputed."""
  if batch is None:
    return _step_of_fields(tuple(fields.items()))
  return tiny.one_step(tiny.change(tiny.CONFIG, **fields), batch)


@functools.cache
def _step_of_fields(fields):
  return tiny.one_step(tiny.change(tiny.CONFIG, **dict(fields)), tiny.make_batch())


def test_some_assignments_drop_and_balancers_act():
  """Otherwise the tests below would compare less than they say."""
  expected = step()
  assert np.all(expected["metrics"]["dropped_fraction"] > 0.01)
  assert np.all(expected["metrics"]["switch_loss"] > 0.05)
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(expected["balancer"]))
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(expected["gradients"]))


@pytest.mark.parametrize(
  ("fields", "cut"),
  [
    ({}, {"accumulation": 4, "remat": "full"}),
    ({}, {"scan_layers": False, "remat": "dots"}),
    ({}, {"mesh": MeshConfig(data=8, expert=1), "remat": "full"}),
    ({}, {"mesh": MeshConfig(data=2, expert=4), "remat": "exchange"}),
    ({}, {"mesh": MeshConfig(data=1, expert=4), "accumulation": 2, "remat": "full"}),
    ({"dispatcher": "einsum"}, {"mesh": MeshConfig(data=2, expert=2), "accumulation": 2, "remat": "full"}),
    ({"dispatcher": "dropless"}, {"mesh": MeshConfig(data=2, expert=2), "accumulation": 2, "remat": "full"}),
    # draws, and two sequences share the slots of a group
    (
      {"router": "gshard_top2", "accept_leaks": "gshard_top2", "group_size": 32},
      {"mesh": MeshConfig(data=2, expert=1), "accumulation": 2, "remat": "full"},
    ),
  ],
  ids=lambda fields: "-".join(f"{k}={v}" for k, v in fields.items()),
)
def test_step_is_the_same(fields, cut):
  tiny.assert_same(step(**fields | cut), step(**fields))


@pytest.mark.parametrize("router", ["expert_choice", "softmax_topk"])
def test_masked_tokens_are_the_same(router):
  """Which tokens are masked, and what a bidirectional model makes of them; padding is seen by none."""
  balancers = "z_loss:0.01" if router == "expert_choice" else "loss_free_bias:0.01"
  fields = {"objective": "masked_lm", "router": router, "balancers": balancers}
  batch = tiny.make_batch()
  expected = step(batch, **fields)
  batch = batch | {"tokens_BL": np.where(batch["mask_BL"], batch["tokens_BL"], 7)}
  tiny.assert_same(
    step(batch, **fields, mesh=MeshConfig(data=2, expert=1), accumulation=4, remat="full"), expected
  )


def test_permuting_the_batch_changes_nothing():
  order = np.random.default_rng(3).permutation(8)
  batch = {name: value[order] for name, value in tiny.make_batch().items()}
  tiny.assert_same(step(batch, **NO_DROPS), step(**NO_DROPS))


def test_padding_rows_change_nothing():
  batch = {name: np.concatenate([value, value]) for name, value in tiny.make_batch().items()}
  batch["mask_BL"][8:] = False
  tiny.assert_same(step(batch, **NO_DROPS, batch_size=16), step(**NO_DROPS))


def test_padding_the_length_changes_nothing():
  short, long = tiny.make_batch(), tiny.make_batch(length=20, seed=1)
  for name in ("tokens_BL", "targets_BL"):
    long[name][:, :16] = short[name]
  long["mask_BL"] = np.concatenate([short["mask_BL"], np.zeros((8, 4), bool)], axis=1)
  tiny.assert_same(step(long, **NO_DROPS, sequence_length=20), step(**NO_DROPS))


def test_what_padding_holds_changes_nothing():
  batch = tiny.make_batch()
  hidden = ~batch["mask_BL"]
  batch["targets_BL"] = np.where(hidden, 1, batch["targets_BL"])
  # the token of the first hidden position is the input of a hidden target: nothing real reads it
  batch["tokens_BL"] = np.where(hidden, 7, batch["tokens_BL"])
  tiny.assert_same(step(batch), step())


def test_micro_batch_scope_is_the_exception():
  """It balances within each micro-batch by choice, so cutting the step changes what it asks for."""
  whole, cut = (step(balancers=OF_MICRO_BATCHES, accumulation=n)["metrics"] for n in (1, 4))
  np.testing.assert_allclose(whole["loss"], cut["loss"], rtol=1e-6)
  assert np.all(cut["switch_loss"] > whole["switch_loss"] * 1.01)  # four small ones are less balanced


def test_layers_add_up():
  """So the pull on one router does not depend on how many other layers there are. In one piece, which is all the same."""
  for layers, fields in ((2, {}), (4, {"num_layers": 4})):
    metrics = step(balancers=OF_MICRO_BATCHES, accumulation=1, **fields)["metrics"]
    of_layers_R = metrics["switch_loss"]
    assert of_layers_R.shape == (layers,) and np.all(
      (of_layers_R > 0.099) & (of_layers_R < 0.2)
    )  # 0.4 collapsed
    np.testing.assert_allclose(metrics["total_loss"], metrics["loss"] + of_layers_R.sum(), rtol=1e-6)


def test_the_checks_can_fail():
  """Another batch is told apart, and so is one number of a gradient that is off by a part in ten thousand."""
  with pytest.raises(AssertionError):
    tiny.assert_same(step(tiny.make_batch(seed=1)), step())
  gradients = jax.tree.map(np.copy, step()["gradients"])
  one = jax.tree.leaves(gradients)[3]
  one[np.unravel_index(np.abs(one).argmax(), one.shape)] *= 1.0001
  with pytest.raises(AssertionError):
    tiny.assert_same(step() | {"gradients": gradients}, step())
