"""Wrong objectives of a user's own: one line that names the flag and the objective, before anything is trained."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import moe_jax
from moe_jax import sharding
from moe_jax.errors import InputError
from moe_jax.training.compiled import check_run
from moe_jax.training.objectives import MaskedTokens, NextTokens, Response, nll
from tests import tiny

TWICE = r"with each sequence twice is \S+, and \S+ with each once; it must be twice as large: the sum .*, not a mean"
LIKELIHOOD = (
  r"evaluate is the training loss, which is \S+ where the negative log likelihood of the targets is"
)


def check(objective, **fields):
  return check_run(
    tiny.change(tiny.CONFIG, objective=objective, **fields), sharding.make_mesh(tiny.ONE_DEVICE)
  )


def losses_of(model, batch, context):
  logits_BLV, aux = model(batch["tokens_BL"], context)
  return nll(logits_BLV, batch["targets_BL"]), aux


@dataclasses.dataclass(frozen=True)
class own(moe_jax.Objective):
  """The likelihood as a user writes it first, which subclasses spoil."""

  def __call__(self, model, batch, context):
    loss_BL, aux = losses_of(model, batch, context)
    return moe_jax.Terms(self.read(loss_BL, batch), aux)

  def read(self, loss_BL, batch):
    return jnp.sum(loss_BL * batch["mask_BL"])


def of(base=own, **attributes):
  return dataclasses.dataclass(frozen=True)(type("own", (base,), attributes))


def mean(self, loss_BL, batch):
  return jnp.sum(loss_BL * batch["mask_BL"]) / batch["mask_BL"].sum()


def true_nll(self, model, batch, context):
  loss_BL, aux = losses_of(model, batch, context)
  return moe_jax.Terms(jnp.sum(loss_BL * batch["mask_BL"]), aux)


def mean_nll(self, model, batch, context):
  loss, aux = true_nll(self, model, batch, context)
  return moe_jax.Terms(loss / batch["mask_BL"].sum(), aux)


def weighing(self, batch, key_B, vocab_size):
  return batch | {"weight_BL": batch["mask_BL"] / batch["mask_BL"].sum()}


WRONG = {
  "mean": (of(read=mean), f"the training loss of a batch {TWICE}"),
  "plain_mean": (
    of(read=lambda self, loss_BL, batch: loss_BL.mean()),
    f"the training loss of a batch {TWICE}",
  ),
  "mean_beside_evaluate": (of(read=mean, evaluate=true_nll), f"the training loss of a batch {TWICE}"),
  "mean_of_next_token": (
    of(moe_jax.NextToken, token_losses=lambda self, logits, targets: nll(logits, targets) / targets.size),
    f"the training loss of a batch {TWICE}",
  ),
  "mean_by_prepare": (
    of(prepare=weighing, read=lambda self, loss_BL, batch: jnp.sum(loss_BL * batch["weight_BL"])),
    f"the training loss of a batch {TWICE}",
  ),
  "evaluates_a_mean": (of(evaluate=mean_nll), f"evaluate of a batch {TWICE}"),
  "one_target": (of(num_targets=lambda self, batch: jnp.int32(1)), f"num_targets of a batch {TWICE}"),
  "evaluates_its_loss": (
    of(read=lambda self, loss_BL, batch: jnp.sum((loss_BL + 0.1 * loss_BL**2) * batch["mask_BL"])),
    f"{LIKELIHOOD} .* override evaluate, or derive from NextToken and override token_losses",
  ),
  "counts_padding": (of(read=lambda self, loss_BL, batch: loss_BL.sum()), LIKELIHOOD),
  "means_of_sequences": (
    of(read=lambda self, loss_BL, batch: jnp.sum(loss_BL.mean(axis=1))),
    LIKELIHOOD,
  ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_objective_is_named(kind):
  objective, message = WRONG[kind]
  with pytest.raises(InputError, match=rf"^--objective=own: objective own \(.*\): {message}") as error:
    check(objective)
  assert "\n" not in str(error.value)


def squared(self, loss_BL, batch):
  return jnp.sum(loss_BL**2 * batch["mask_BL"])


def masked(self, batch, key_B, vocab_size):
  """Tokens are targets by the key of their sequence, under a name that only this objective knows."""
  length = batch["tokens_BL"].shape[1]
  chosen_BL = batch["mask_BL"] & jax.vmap(lambda key: jax.random.bernoulli(key, 0.4, (length,)))(key_B)
  tokens_BL = jnp.where(chosen_BL, vocab_size, batch["tokens_BL"])
  return batch | {"tokens_BL": tokens_BL, "targets_BL": batch["tokens_BL"], "chosen_BL": chosen_BL}


def noisy(self, model, batch, context):
  """Draws in training, by the keys of sequences."""
  loss_BL, aux = losses_of(model, batch, context)
  if context.train:
    loss_BL *= jax.vmap(lambda key: jax.random.uniform(key, loss_BL.shape[1:]))(context.key_B)
  return moe_jax.Terms(jnp.sum(loss_BL * batch["mask_BL"]), aux)


RIGHT = {
  "likelihood": own,
  "other_loss": of(read=squared, evaluate=true_nll),
  "token_losses": of(moe_jax.NextToken, token_losses=lambda self, logits, targets: nll(logits, targets) ** 2),
  "draws": of(__call__=noisy),
  "masked": of(
    causal=False,
    num_extra_ids=1,
    prepare=masked,
    num_targets=lambda self, batch: batch["chosen_BL"].sum(),
    read=lambda self, loss_BL, batch: jnp.sum(loss_BL * batch["chosen_BL"]),
  ),
  "masked_tokens": of(MaskedTokens, rate=0.5),
  "response": of(Response),
  "zero": of(moe_jax.NextToken, token_losses=lambda self, logits, targets: 0 * nll(logits, targets)),
  "not_finite": of(read=lambda self, loss_BL, batch: loss_BL.sum() * jnp.nan),
}


@pytest.mark.parametrize("kind", RIGHT)
def test_a_right_objective_passes(kind, capsys):
  check(RIGHT[kind])
  assert "not tried" not in capsys.readouterr().err


def test_one_that_looks_ahead_passes(capsys):
  check(of(NextTokens), mtp_depth=1)
  assert "not tried" not in capsys.readouterr().err


def test_a_loss_that_is_neither_sum_nor_mean_is_said(capsys):
  def penalised(self, model, batch, context):
    loss, aux = true_nll(self, model, batch, context)
    return moe_jax.Terms(loss + 1e3 * jnp.sum(model.embedding_VD[...] ** 2), aux)

  check(of(__call__=penalised, evaluate=true_nll))
  (said,) = capsys.readouterr().err.splitlines()
  assert (
    "note: objective own" in said and "is not twice as large" in said and "is no sum over targets" in said
  )


def of_experts(self, model, batch, context):
  loss_BL, aux = losses_of(model, batch, context)
  return moe_jax.Terms(loss_BL.sum() + aux[0][0].ffn.losses["z_loss"].sum(), aux)


def needs_more(self, batch, key_B, vocab_size):
  raise InputError("objective own: the data has no pages")


def test_one_that_cannot_be_tried_is_not_refused(capsys):
  check(of(__call__=of_experts))
  assert "--objective=own (" in (said := capsys.readouterr().err) and "not tried before the run" in said
  check(of(prepare=needs_more))


def test_it_is_tried_on_any_mesh(capsys):
  with jax.set_mesh(jax.make_mesh((8,), ("data",))):
    check(of())
    with pytest.raises(InputError, match=TWICE):
      check(of(read=mean))
  assert "not tried" not in capsys.readouterr().err
