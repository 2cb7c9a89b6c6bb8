"""Replaying a model's own choices changes nothing; those of another are taken, with live weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.adapt.replay import record, report
from moe_jax.adapt.routes import selected
from moe_jax.errors import InputError
from moe_jax.nn.context import Context
from moe_jax.nn.routers import ROUTERS
from moe_jax.nn.variables import abstract
from moe_jax.ops.routing import selected_experts
from moe_jax.types import RouterContext
from tests import tiny
from tests.adapt import models

BATCH = tiny.make_batch()


def config_of(router, **fields):
  moe = dataclasses.replace(models.SPARSE, router=router)
  return dataclasses.replace(models.CONFIG, moe=moe, **fields)


@jax.jit
def gradient(model, routes_XBLE):
  def loss(model):
    context = Context(mask_BL=BATCH["mask_BL"], routes_XBLE=routes_XBLE)
    logits_BLV, aux = model(BATCH["tokens_BL"], context._replace(record_logits=True))
    chosen = jax.tree.leaves(
      [block.ffn.selected_BLE for segment in aux for block in segment if block.ffn is not None]
    )
    return jnp.sum(jax.nn.log_softmax(logits_BLV)[..., 3] * BATCH["mask_BL"]), chosen

  (value, chosen), found = nnx.value_and_grad(loss, has_aux=True)(model)
  return value, found, chosen


@pytest.mark.parametrize(
  ("router", "fields"),
  [
    ("softmax_topk", {}),
    ("softmax_topk:softmax=before", {"num_dense_first": 1}),
    ("sigmoid_topk:normalize=true", {}),
    ("group_limited_topk", {}),
  ],
)
def test_replaying_own_choices_changes_nothing_gradients_included(router, fields):
  model = models.model(config_of(router, **fields))
  routes_XBLE = record(model, BATCH)
  assert routes_XBLE.shape == (2, 8, 16, 8) and routes_XBLE[-1].sum() == 2 * BATCH["mask_BL"].sum()
  (value, found, _), (want, expected, _) = gradient(model, routes_XBLE), gradient(model, None)
  np.testing.assert_allclose(value, want, rtol=1e-6)
  for got, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(got, right, rtol=1e-4, atol=1e-4 * max(float(np.abs(right).max()), 1e-3))
  np.testing.assert_allclose(report(model, BATCH, routes_XBLE).log_ratio, 0, atol=1e-5)


def test_choices_of_another_model_are_taken_and_the_router_is_trained():
  model, other = models.model(), models.model(seed=1)
  routes_XBLE = record(other, BATCH)
  _, found, (chosen_RBLE,) = gradient(model, routes_XBLE)
  np.testing.assert_array_equal(chosen_RBLE, routes_XBLE)
  router = dict(nnx.to_flat_state(found))[
    ("segments", 0, "pattern", "blocks", 0, "ffn", "router", "w_router_DE")
  ]
  assert np.abs(router.get_value()).max() > 1e-3
  said = report(model, BATCH, routes_XBLE)
  own = selected(model, BATCH)
  np.testing.assert_allclose(
    said.differing, (routes_XBLE * (1 - own)).sum((1, 2, 3)) / routes_XBLE.sum((1, 2, 3)), rtol=1e-6
  )
  assert said.differing.min() > 0.3 and np.abs(said.log_ratio).max() > 0.01
  assert not said.log_ratio[~BATCH["mask_BL"]].any()


def test_routers_that_replay_take_what_was_recorded():
  """In training, too, where some draw; what is recorded are their choices for other inputs, without drawing."""
  one, other = np.random.default_rng(0).normal(size=(2, 1, 16, 8)).astype(np.float32)
  mask_GT, sequence_GT = np.arange(16)[None] < 13, np.zeros((1, 16), np.int32)
  skipped = {"switch_top1", "base_assignment", "merged_topk"}  # two take K = 1, one wraps another
  specs = (*sorted(set(ROUTERS) - skipped), "topology_aware_topk:max_remote_fraction=0")
  sizes = {"dim": 8, "num_experts": 16, "num_experts_per_token": 2}
  make = lambda spec: ROUTERS.resolve(spec)(**sizes, rngs=nnx.Rngs(0))
  replay = [spec for spec in specs if abstract(lambda s=spec: make(s)).replays]

  @jax.jit
  def run():
    chosen = lambda router, x, context: jax.vmap(selected_experts)(router(x, context))
    found = {}
    for spec in replay:
      router = make(spec)
      context = RouterContext(mask_GT, sequence=sequence_GT)
      recorded = chosen(router, other, context)
      drawing = context._replace(key=jax.random.split(jax.random.key(0), 1), train=True, routes=recorded)
      found[spec] = recorded, chosen(router, one, drawing)
    return found

  for spec, (recorded, taken) in run().items():
    np.testing.assert_array_equal(taken, recorded, err_msg=spec)
    assert recorded.sum() == 2 * mask_GT.sum(), spec
  refusing = set(specs) - set(replay)
  assert {"top_p", "gshard_top2", "st_moe_topn", "token_rounding", "topology_aware_topk", "remoe"} <= refusing
  assert {"softmax_topk", "batch_prioritized", "noisy_topk", "moe_plus_plus", "grouped_topk"} <= set(replay)


@pytest.mark.parametrize("router", ["remoe", "top_p"])
def test_a_router_whose_choices_cannot_be_given_says_so(router):
  model = models.model(config_of(router))
  with pytest.raises(InputError, match="router LinearRouter: its choices cannot be given"):
    model(BATCH["tokens_BL"], Context(routes_XBLE=np.zeros((2, 8, 16, 8), np.float32)))
