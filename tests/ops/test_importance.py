"""Properties of the losses on a coefficient of variation (1701.06538, eq. 6-7 and 10-11)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import InputError
from moe_jax.ops.balancing import make_balancer
from moe_jax.ops.balancing.importance import cv_squared
from moe_jax.ops.balancing.losses import SCOPES
from moe_jax.ops.routing import make_choice, to_batch
from moe_jax.types import BatchRouting
from tests import tiny
from tests.ops.balancer_laws import loss_of
from tests.ops.choosing import route
from tests.reference import importance as reference


def routing_of(values_BLE, mask_BL=None, group=4):
  """A routing whose weights, smooth load and scores all are `values_BLE`."""
  values_BLE = jnp.asarray(values_BLE, jnp.float32)
  mask_BL = np.ones(values_BLE.shape[:2], bool) if mask_BL is None else mask_BL
  chosen_BLE = (values_BLE > 0).astype(jnp.float32)
  return BatchRouting(
    values_BLE,
    jnp.log(values_BLE),
    chosen_BLE,
    mask_BL,
    group,
    2,
    smooth_load_BLE=values_BLE,
    weights_BLE=values_BLE,
  )


SPECS = ["importance_loss:1:{}", "importance_loss:1:{}:scores", "load_loss:1:{}"]
EVERY_SPEC = [spec.format(scope) for spec in SPECS for scope in SCOPES]


# --- values ---


@pytest.mark.parametrize(
  ("values_E", "want"),
  [
    ([1, 1, 1, 1], 0),
    ([3, 0, 0, 0], 3),  # E - 1
    ([2, 2, 0, 0], 1),  # E / K - 1
    ([1, 3], 0.25),  # population deviation 1, mean 2; the sample's variance would give 0.5
    ([5], 0),
    ([0, 0, 0], 0),
    ([1e-30, 3e-30], 0.25),  # with an epsilon in the quotient it would be 0
  ],
)
def test_cv_squared(values_E, want):
  np.testing.assert_allclose(cv_squared(jnp.array([values_E], jnp.float32))[0], want, rtol=1e-6)
  np.testing.assert_allclose(reference.cv_squared([float(v) for v in values_E]), want, atol=1e-12)


@functools.cache
def losses_at_both_ends():
  """Of every spec, (loss at balance, loss when collapsed, E / K) for several E and K. One program."""
  values, ratios = [], []
  for num_experts, k in [(2, 1), (4, 2), (8, 2), (4, 4)]:
    one_token_E = np.where(np.arange(num_experts) < k, 1 / k, 1e-30)
    balanced_BLE = np.stack([[np.roll(one_token_E, t) for t in range(8)]] * 2)
    values.append((balanced_BLE, np.broadcast_to(one_token_E, (2, 8, num_experts))))
    ratios.append(num_experts / k)

  @jax.jit
  def losses(values):
    of = lambda spec, balanced_BLE, collapsed_BLE: (
      loss_of(spec, routing_of(balanced_BLE, group=8)),
      loss_of(spec, routing_of(collapsed_BLE)),
    )
    return {spec: [of(spec, *both) for both in values] for spec in EVERY_SPEC}

  return {
    spec: [(*both, r) for both, r in zip(of, ratios, strict=True)] for spec, of in losses(values).items()
  }


@pytest.mark.parametrize("spec", EVERY_SPEC)
def test_zero_at_balance_and_e_over_k_less_one_when_collapsed(spec):
  """The exception to "weight x 1 at perfect balance": a variation has nothing left there."""
  for balanced, collapsed, experts_per_choice in losses_at_both_ends()[spec]:
    np.testing.assert_allclose(balanced, 0, atol=1e-6)
    np.testing.assert_allclose(collapsed, experts_per_choice - 1, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", ["importance_loss:1:sequence", "load_loss:1:global_batch"])
def test_shrinking_all_values_gains_nothing(spec):
  """With an epsilon in the quotient, weights that do not sum to 1 (a sigmoid's) could go where the loss is 0."""
  values_BLE = np.random.default_rng(0).uniform(0.1, 1, (2, 8, 4)) * [1, 0.5, 0.2, 0.1]
  losses = [loss_of(spec, routing_of(values_BLE * scale)) for scale in (1, 1e-8, 1e-25)]
  assert losses[0] > 0.2
  np.testing.assert_allclose(losses, losses[0], rtol=1e-5)


def test_equal_importance_may_be_unequal_load():
  """Why the paper has both: one expert gets two tokens, the other four lighter ones."""
  weights_BLE = np.array([[[1, 0]] * 2 + [[0, 0.5]] * 4])
  routing = routing_of(weights_BLE)._replace(smooth_load_BLE=jnp.asarray(weights_BLE > 0, jnp.float32))
  assert loss_of("importance_loss:1", routing) == 0
  np.testing.assert_allclose(loss_of("load_loss:1", routing), reference.cv_squared([2, 4]), rtol=1e-6)


# --- the whole step ---


@pytest.mark.parametrize("spec", ["importance_loss:0.5", "load_loss:0.5"])
def test_unequal_micro_batches_add_up_to_the_exact_gradient(spec):
  """Three micro-batches of different size and mix, weighted by their shares of tokens: in float64 terms the
  loss is a nonlinear function of sums over all, and its gradient still adds up."""
  rng = np.random.default_rng(0)
  values_BLE = rng.uniform(0, 1, (3, 6, 4)) * np.array([[[4, 1, 1, 1]], [[1, 1, 3, 1]], [[1, 2, 1, 0.5]]])
  mask_BL = np.arange(6)[None] < np.array([[6], [3], [1]])
  balancer = make_balancer(spec)

  def loss(values_BLE, mask_BL, step):
    return loss_of(spec, routing_of(values_BLE, mask_BL), step)

  whole = balancer.observe(balancer.init(4), routing_of(values_BLE, mask_BL))
  step = jax.jit(jax.value_and_grad(loss))
  want_loss, want = step(values_BLE, mask_BL, whole)
  sums_E = (values_BLE * mask_BL[..., None]).sum(axis=(0, 1))
  np.testing.assert_allclose(want_loss, 0.5 * reference.cv_squared(list(sums_E)), rtol=1e-5)
  got_loss, got = 0, 0
  for b in range(3):
    part_BL = mask_BL & (np.arange(3) == b)[:, None]
    part_loss, part = step(values_BLE, part_BL, whole)
    share = part_BL.sum() / mask_BL.sum()
    got_loss, got = got_loss + share * part_loss, got + share * part
    if b == 1:  # alone it pulls elsewhere: a loss of its own would not add up
      alone = step(values_BLE, part_BL, balancer.observe(balancer.init(4), routing_of(values_BLE, part_BL)))[
        1
      ]
      assert np.abs(alone - part).max() > 0.1 * np.abs(part).max()
  np.testing.assert_allclose(got_loss, want_loss, rtol=1e-6)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-8)


def test_buffer_sees_the_micro_batches_so_far():
  first, second = routing_of([[[1, 0]] * 4]), routing_of([[[0, 1]] * 4])
  balancer = make_balancer("importance_loss:1:buffer")
  of_first, of_second = (balancer.observe(balancer.init(2), routing) for routing in (first, second))
  so_far = jax.tree.map(jnp.add, of_first, of_second)
  assert loss_of("importance_loss:1:buffer", first) == 1  # E - 1: nothing came before
  assert loss_of("importance_loss:1:buffer", second, so_far) == 0
  assert not balancer.needs_whole_step and make_balancer("importance_loss").needs_whole_step


CONFIG = tiny.change(
  tiny.CONFIG,
  num_layers=1,
  router="noisy_topk",
  balancers="importance_loss:1,load_loss:1,importance_loss:1:sequence:scores",
)


def test_a_training_step_is_the_same_however_it_is_cut():
  """With noise: draws belong to sequences. And the losses act."""
  whole = tiny.one_step(CONFIG, tiny.make_batch())
  tiny.assert_same(tiny.one_step(tiny.change(CONFIG, accumulation=2), tiny.make_batch()), whole)
  for name in ("importance_loss", "load_loss", "importance_loss#2"):
    assert np.isfinite(whole["metrics"][name]).all()
  assert (whole["metrics"]["importance_loss"] > 1e-3).all()


# --- what the layer gives ---


def test_batch_weights_are_those_of_the_assignment_with_gradient():
  """Skipped second choices and padding weigh nothing."""
  choice, key = make_choice("gshard_top2", 6, 2), jax.random.key(0)
  logits_GTE = np.random.default_rng(0).normal(size=(2, 8, 6)).astype(np.float32)
  mask_GT = np.arange(16).reshape(2, 8) % 5 != 3

  def weights(logits_GTE):
    routing = jax.vmap(lambda logits, mask: route(choice, logits, mask=mask, key=key))(logits_GTE, mask_GT)
    return to_batch(routing, 1, 16, 2).weights_BLE, routing.assignment

  weights_BLE, a = jax.jit(weights)(logits_GTE)
  want_GTE = np.zeros((2, 8, 6))
  for g in range(2):
    for t, e, w, valid in zip(a.token_A[g], a.expert_A[g], a.weight_A[g], a.valid_A[g]):
      want_GTE[g, t, e] += w * valid
  np.testing.assert_allclose(weights_BLE[0], want_GTE.reshape(16, 6), rtol=1e-6)
  assert 0 < (want_GTE > 0).sum() < 2 * mask_GT.sum()
  gradient = jax.jit(jax.grad(lambda x: weights(x)[0][..., 0].sum()))(logits_GTE)
  assert np.abs(gradient).max() > 0.01 and not gradient[~mask_GT].any()


def test_what_the_train_step_is_told():
  plain = make_choice("softmax_topk", 4, 2)
  make_balancer("importance_loss").suits(plain, 0)
  make_balancer("load_loss").suits(make_choice("noisy_topk", 4, 2), 0)
  with pytest.raises(InputError, match="reads the smooth load, which this router does not give"):
    make_balancer("load_loss").suits(plain, 0)
  assert make_balancer("load_loss:1:sequence").needs_sequences
