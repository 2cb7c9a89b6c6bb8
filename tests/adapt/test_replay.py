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


def test_a_router_whose_choices_cannot_be_given_says_so():
  model = models.model(config_of("remoe"))
  with pytest.raises(InputError, match="router LinearRouter: its choices cannot be given"):
    model(BATCH["tokens_BL"], Context(routes_XBLE=np.zeros((2, 8, 16, 8), np.float32)))
