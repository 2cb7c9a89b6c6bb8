"""The laws that every balancer obeys, one row of `balancer_rows.ROWS` per balancer."""

import functools

import jax
import numpy as np
import pytest

from moe_jax.ops.balancing import BALANCERS
from moe_jax.ops.balancing.losses import SCOPES
from moe_jax.types import BatchRouting
from tests.ops.balancer_laws import (
  MASK_BL,
  in_micro_batches,
  logits_of,
  loss_of,
  nothing_observed,
  run,
  selected,
  total_loss,
  with_huge_padding,
)
from tests.ops.balancer_rows import ROWS, B, E, K, L
from tests.reference.routing import finite_differences


def rows_that(condition):
  chosen = {name: row for name, row in ROWS.items() if condition(row)}
  return pytest.mark.parametrize("row", chosen.values(), ids=chosen)


every_balancer = rows_that(lambda row: True)
every_load_balancing_loss = rows_that(lambda row: row.unit and row.has_gradient)


def assert_observed(row, observed, logits_BLE, mask_BL):
  """`observed` is what the row says; a balancer that says nothing observes nothing."""
  if row.observed is None:
    assert not jax.tree.leaves(observed)
    return
  want = jax.tree.leaves(row.observed(logits_BLE, mask_BL))
  for got, leaf in zip(jax.tree.leaves(observed), want, strict=True):
    np.testing.assert_allclose(got, leaf, rtol=1e-5, atol=1e-6)


def test_every_balancer_has_a_row():
  assert {row.spec.split(":")[0] for row in ROWS.values()} == BALANCERS.builtin


@every_balancer
@pytest.mark.parametrize("mask_BL", [np.ones((B, L), bool), MASK_BL], ids=["no_mask", "mask"])
def test_equals_the_loop(row, mask_BL):
  for seed in range(3):
    logits_BLE = logits_of(seed)
    loss, observed, _ = run(row, logits_BLE, mask_BL)
    float_BLE = logits_BLE.astype(float)
    np.testing.assert_allclose(loss, row.loss(float_BLE, mask_BL, float_BLE, mask_BL), rtol=1e-5)
    assert_observed(row, observed, float_BLE, mask_BL)


@every_balancer
def test_gradient_equals_finite_differences_of_the_loop(row):
  logits_BLE = logits_of()
  _, _, gradient = run(row, logits_BLE)
  step_BLE = logits_BLE.astype(float)
  want = finite_differences(lambda x: row.loss(x, MASK_BL, step_BLE, MASK_BL), logits_BLE)
  np.testing.assert_allclose(gradient, want, atol=1e-6)
  np.testing.assert_array_equal(gradient[~MASK_BL], 0)
  # Neither a gradient of zero where there is a loss, nor a loss where the weight is zero.
  assert (np.abs(gradient).max() > 1e-4) if row.has_gradient else (gradient == 0).all()


@every_balancer
def test_masked_tokens_do_not_count(row):
  loss, observed, gradient = run(row, logits_of())
  huge = run(row, with_huge_padding(logits_of()))
  np.testing.assert_allclose(huge[0], loss, rtol=1e-6)
  np.testing.assert_allclose(huge[2], gradient, atol=1e-7)
  jax.tree.map(np.testing.assert_array_equal, huge[1], observed)


@every_balancer
def test_a_fully_masked_batch_gives_zero(row):
  loss, observed, gradient = run(row, logits_of(), np.zeros((B, L), bool))
  assert loss == 0
  np.testing.assert_array_equal(gradient, 0)
  assert all((x == 0).all() for x in jax.tree.leaves(observed))


@rows_that(lambda row: row.permutable)
def test_permuting_experts_changes_nothing(row):
  logits_BLE, order = logits_of(), np.array([2, 0, 3, 1])
  loss, observed, gradient = run(row, logits_BLE)
  permuted = run(row, logits_BLE[..., order])
  np.testing.assert_allclose(permuted[0], loss, rtol=1e-6)
  np.testing.assert_allclose(permuted[2], gradient[..., order], atol=1e-7)
  of_expert = lambda x, y: np.testing.assert_allclose(x, y[order] if y.ndim else y, rtol=1e-6)
  jax.tree.map(of_expert, permuted[1], observed)  # statistics have E in front, or no axis


@every_balancer
def test_jit_equals_no_jit(row):
  """Also with huge padding: XLA turns a product with a mask into a choice, which would hide inf * 0."""
  loss, observed, _ = run(row, logits_of())
  eager_loss, eager_observed = total_loss(
    row,
    with_huge_padding(logits_of()),
    selected(row.score, logits_of(), MASK_BL),
    MASK_BL,
    nothing_observed(row),
  )
  np.testing.assert_allclose(loss, eager_loss, rtol=1e-6)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), observed, eager_observed)


@every_balancer
def test_micro_batches_add_up_to_the_batch(row):
  """One step is the same step however it is cut up; only the scope `micro_batch` depends on the cut."""
  logits_BLE = logits_of()
  loss, observed, gradient = run(row, logits_BLE)
  cut_loss, cut_observed, cut_gradient = in_micro_batches(row, logits_BLE, MASK_BL)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), cut_observed, observed)
  if row.depends_on_the_cut:
    assert abs(cut_loss - loss) > 1e-3 * loss
    return
  np.testing.assert_allclose(cut_loss, loss, rtol=1e-6)
  np.testing.assert_allclose(cut_gradient, gradient, atol=1e-7)


LOAD_BALANCING = {f"{name}_{scope}": scope for name in ("switch", "gshard") for scope in SCOPES}


@pytest.mark.parametrize("name", LOAD_BALANCING)
def test_what_each_scope_sees(name):
  """Each micro-batch is collapsed on two experts of its own, yet over both all experts are used equally."""
  row, scope = ROWS[name], LOAD_BALANCING[name]
  weight = float(row.spec.split(":")[1])
  logits_BLE = np.full((B, L, E), -20, np.float32)
  logits_BLE[: B // 2, :, :2] = 20
  logits_BLE[B // 2 :, :, 2:] = 20
  all_tokens = np.ones((B, L), bool)
  cut = in_micro_batches(row, logits_BLE, all_tokens)[0] / weight
  whole = run(row, logits_BLE, all_tokens)[0] / weight
  balanced = scope in ("buffer", "global_batch")  # here the buffer is full for both micro-batches
  want = (E / K, 1) if scope == "micro_batch" else (1, 1) if balanced else (E / K, E / K)
  np.testing.assert_allclose((cut, whole), want, rtol=1e-5)


# --- scale ---


@functools.partial(jax.jit, static_argnames=("group", "k"))
def unit_losses(logits_BLE, log_scores_BLE, selected_BLE, mask_BL, group, k):
  """Every load-balancing loss with weight 1."""
  routing, found = BatchRouting(logits_BLE, log_scores_BLE, selected_BLE, mask_BL, group, k), {}
  for row in ROWS.values():
    if row.unit and logits_BLE.shape[-1] % row.multiple_of == 0:
      found[row.unit] = loss_of(row.unit, routing)
  return found


def unit_losses_of(logits_LE, k, group):
  """The same for two sequences of `logits_LE`; the scores, as sigmoids do, sum to anything."""
  log_scores_LE = logits_LE + np.log(np.random.default_rng(0).uniform(0.1, 1, (len(logits_LE), 1)))
  twice = lambda x: np.stack([x, x]).astype(np.float32)
  mask_BL = np.ones((2, len(logits_LE)), bool)
  selected_BLE = selected("softmax", twice(logits_LE), mask_BL, k)
  return unit_losses(twice(logits_LE), twice(log_scores_LE), selected_BLE, mask_BL, group=group, k=k)


EVERY_SHAPE = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4), (8, 1), (8, 2), (8, 4)]


@pytest.mark.parametrize(("num_experts", "k"), EVERY_SHAPE)
def test_one_at_balance_and_e_over_k_when_collapsed(num_experts, k):
  """Token t has the logits of token 0, moved on by t experts: balanced within every 8 tokens."""
  base_E = np.linspace(2, -2, num_experts)
  balanced_LE = np.stack([np.roll(base_E, t) for t in range(16)])
  for spec, loss in unit_losses_of(balanced_LE, k, group=8).items():
    np.testing.assert_allclose(loss, 1, rtol=1e-5, err_msg=spec)
  collapsed_LE = np.full((16, num_experts), -30.0)
  collapsed_LE[:, :k] = 30
  collapsed = {row.unit: row.collapsed for row in ROWS.values()}
  for spec, loss in unit_losses_of(collapsed_LE, k, group=8).items():
    if collapsed[spec]:
      np.testing.assert_allclose(loss, num_experts / k, rtol=1e-5, err_msg=spec)


def test_units_are_weighted_by_their_valid_tokens():
  """Two sequences, one balanced (loss 1) with 6 tokens, one collapsed (loss 2) with 2 tokens."""
  logits_BLE = np.full((B, L, E), -20, np.float32)
  for t in range(L):
    logits_BLE[0, t, [(2 * t) % E, (2 * t + 1) % E]] = 20
  logits_BLE[1, :, :2] = 20
  mask_BL = np.zeros((B, L), bool)
  mask_BL[0], mask_BL[1, 1:3] = True, True
  row = ROWS["switch_sequence"]
  np.testing.assert_allclose(run(row, logits_BLE, mask_BL)[0] / 0.5, (6 * 1 + 2 * 2) / 8, rtol=1e-5)


def test_tiny_sigmoid_scores_do_not_escape_the_loss():
  """The scores enter by their ratios: with an epsilon in their sum, a router could shrink them all."""
  row = ROWS["gshard_sequence"]
  collapsed_BLE = logits_of(skew=3)
  all_tokens = np.ones((B, L), bool)
  for shift in (0, -30, -60, -200):
    logits_BLE = (collapsed_BLE + shift).astype(np.float32)
    loss, _, gradient = run(row, logits_BLE, all_tokens)
    np.testing.assert_allclose(loss, row.loss(*[logits_BLE.astype(float), all_tokens] * 2), rtol=1e-5)
    assert loss > 1.2 * 2
  # Far out on the tail, moving all logits of a token together gains nothing, but moving them apart does.
  np.testing.assert_allclose(gradient.sum(axis=-1), 0, atol=1e-7)
  assert np.abs(gradient).max() > 1e-3
  scores_BLE = np.exp(logits_BLE.astype(float))
  assert (scores_BLE / (scores_BLE.sum(axis=-1, keepdims=True) + 1e-20)).sum(axis=-1).max() < 1e-3
