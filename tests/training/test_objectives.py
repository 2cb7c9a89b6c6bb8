"""What is trained: losses against loops and formulas, which tokens are masked, an objective of a user's own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.errors import InputError
from moe_jax.nn.context import Context
from moe_jax.sharding import make_mesh
from moe_jax.training.compiled import check_run, resolve_config
from moe_jax.training.objectives import MaskedTokens, NextToken
from tests import tiny

MASKED = tiny.change(tiny.CONFIG, objective="masked_lm", router="expert_choice", balancers="z_loss:0.01")


@dataclasses.dataclass(frozen=True)
class LabelSmoothing(NextToken):
  """As a user writes it: the target gets 1 - `amount`, all ids share the rest."""

  amount: float = 0.3

  def token_losses(self, logits_BLV, targets_BL):
    log_probs_BLV = jax.nn.log_softmax(logits_BLV)
    of_target_BL = jnp.take_along_axis(log_probs_BLV, targets_BL[..., None], axis=-1)[..., 0]
    return -(1 - self.amount) * of_target_BL - self.amount * log_probs_BLV.mean(axis=-1)


def _with_logits(rng):
  """(logits, a model that has them whatever it is given)."""
  logits_BLV = rng.standard_normal((8, 16, tiny.VOCAB)).astype(np.float32)
  return logits_BLV, lambda tokens_BL, context: (jnp.asarray(logits_BLV), ())


def _sum_by_loop(logits_BLV, targets_BL, is_target_BL, smoothing=0.0) -> float:
  total = 0.0
  for b, position in zip(*np.nonzero(is_target_BL), strict=True):
    x = logits_BLV[b, position].astype(np.float64)
    nll_V = np.log(np.sum(np.exp(x))) - x
    total += (1 - smoothing) * nll_V[targets_BL[b, position]] + smoothing * nll_V.mean()
  return total


def test_next_token_is_the_sum_over_real_tokens(rng):
  logits_BLV, model = _with_logits(rng)
  batch = tiny.make_batch()
  objective = NextToken()
  assert objective.num_targets(batch) == batch["mask_BL"].sum() == 8 * 16 - 8 - 3
  expected = _sum_by_loop(logits_BLV, batch["targets_BL"], batch["mask_BL"])
  for loss in (objective(model, batch, Context()).loss, objective.evaluate(model, batch, Context()).loss):
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_label_smoothing_trains_its_own_loss_and_evaluates_the_likelihood(rng):
  logits_BLV, model = _with_logits(rng)
  batch = tiny.make_batch()
  objective = resolve_config(tiny.change(tiny.CONFIG, objective=LabelSmoothing)).train.objective()
  args = logits_BLV, batch["targets_BL"], batch["mask_BL"]
  np.testing.assert_allclose(
    objective(model, batch, Context()).loss, _sum_by_loop(*args, smoothing=0.3), rtol=1e-6
  )
  np.testing.assert_allclose(objective.evaluate(model, batch, Context()).loss, _sum_by_loop(*args), rtol=1e-6)


def test_a_step_and_its_evaluation_use_the_loss_of_the_objective():
  """Without drops and draws, the smoothed loss of the first step lies between the likelihood and the uniform loss."""
  config = tiny.change(
    tiny.CONFIG, objective=LabelSmoothing, capacity_factor=8.0, eval_capacity_factor=8.0, jitter=0.0
  )
  mesh, steps = tiny._steps(config)
  with jax.set_mesh(mesh):
    batch, state = tiny.make_batch(), steps.init(0)
    sums = steps.evaluate(state, batch)
    logits_BLV, _ = jax.jit(_forward(steps.model))(state, batch["tokens_BL"])
    _, metrics = steps.train(state, batch)
  args = np.asarray(logits_BLV), batch["targets_BL"], batch["mask_BL"]
  count = batch["mask_BL"].sum()
  np.testing.assert_allclose(sums.nll, _sum_by_loop(*args), rtol=1e-5)
  np.testing.assert_allclose(metrics["loss"], _sum_by_loop(*args, smoothing=0.3) / count, rtol=1e-5)
  assert (sums.num_targets, sums.num_tokens) == (count, count)


def _forward(abstract):
  graphdef = nnx.graphdef(abstract)
  return lambda state, tokens_BL: nnx.merge(graphdef, state.params, state.variables)(tokens_BL)


def _keys(rows: int, seed: int = 0):
  return jax.random.split(jax.random.key(seed), rows)


def _long_batch(rng):
  batch = {
    "tokens_BL": rng.integers(0, tiny.VOCAB, (64, 128)).astype(np.int32),
    "mask_BL": np.ones((64, 128), bool),
  }
  batch["mask_BL"][::2, 64:] = False
  return batch


def test_masked_tokens_are_15_percent_in_bert_s_proportions(rng):
  batch = _long_batch(rng)
  made = jax.device_get(MaskedTokens().prepare(batch, _keys(64), tiny.VOCAB))
  target_BL, before_BL, after_BL = made["is_target_BL"], batch["tokens_BL"], made["tokens_BL"]
  within = lambda count, n, p: abs(count - n * p) < 4 * np.sqrt(n * p * (1 - p))
  tokens, targets = batch["mask_BL"].sum(), target_BL.sum()
  assert not np.any(target_BL & ~batch["mask_BL"])
  assert within(targets, tokens, 0.15)
  assert within(np.sum(after_BL[target_BL] == tiny.VOCAB), targets, 0.8)
  assert within(np.sum((after_BL == before_BL)[target_BL]), targets, 0.1 + 0.1 / tiny.VOCAB)
  other = after_BL[target_BL & (after_BL != before_BL) & (after_BL != tiny.VOCAB)]
  assert within(len(other), targets, 0.1 - 0.1 / tiny.VOCAB)
  assert len(set(other)) > tiny.VOCAB / 2 and other.min() >= 0  # any id
  np.testing.assert_array_equal(after_BL[~target_BL], before_BL[~target_BL])
  np.testing.assert_array_equal(made["targets_BL"], before_BL)
  assert MaskedTokens().num_targets(made) == targets


def test_draws_belong_to_the_key_of_a_sequence(rng):
  batch = _long_batch(rng)
  order = rng.permutation(64)
  reordered = {name: x[order] for name, x in batch.items()}
  made = MaskedTokens().prepare(batch, _keys(64), tiny.VOCAB)
  again = MaskedTokens().prepare(reordered, _keys(64)[order], tiny.VOCAB)
  other = MaskedTokens().prepare(batch, _keys(64, seed=1), tiny.VOCAB)
  for name in ("tokens_BL", "is_target_BL"):
    np.testing.assert_array_equal(made[name][order], again[name])
    assert np.any(made[name] != other[name])


def test_masked_loss_is_the_sum_over_targets(rng):
  logits_BLV, model = _with_logits(rng)
  made = MaskedTokens(rate=0.5).prepare(tiny.make_batch(), _keys(8), tiny.VOCAB)
  loss = MaskedTokens(rate=0.5)(model, made, Context()).loss
  np.testing.assert_allclose(
    loss, _sum_by_loop(logits_BLV, made["targets_BL"], made["is_target_BL"]), rtol=1e-6
  )


def test_evaluation_masks_the_same_tokens_whatever_the_batch_size():
  """And has one id more than the text."""
  mesh, steps = tiny._steps(MASKED)
  assert steps.abstract_state.params["embedding_VD"].shape == (tiny.VOCAB + 1, 16)
  batch = tiny.make_batch()
  with jax.set_mesh(mesh):
    state = steps.init(0)
    whole = steps.evaluate(state, batch)
    halves = [steps.evaluate(state, {name: x[i : i + 4] for name, x in batch.items()}) for i in (0, 4)]
  total = jax.tree.map(lambda a, b: a + b, *halves)
  assert 0 < total.num_targets == whole.num_targets < 40
  assert total.num_tokens == whole.num_tokens == batch["mask_BL"].sum()
  np.testing.assert_allclose(total.nll, whole.nll, rtol=1e-6)


def test_a_router_that_looks_ahead_leaks_nothing_where_all_tokens_are_seen():
  mesh = make_mesh(MASKED.mesh)
  assert not MASKED.model.moe.accept_leaks
  assert not check_run(MASKED, mesh).model.causal
  with pytest.raises(InputError, match=r"--router=expert_choice: .* --objective=masked_lm"):
    check_run(tiny.change(MASKED, objective="next_token"), mesh)


def test_a_wrong_rate_is_named():
  for rate in (0, 1, -0.1):
    with pytest.raises(InputError, match=f"--objective=masked_lm:rate={rate}.*rate must be in"):
      resolve_config(tiny.change(MASKED, objective=f"masked_lm:rate={rate}"))
