"""Distillation: soft targets against a loop, a model into itself, and the dense student."""

import jax
import numpy as np
import pytest
from flax import nnx

from moe_jax.adapt import to_dense
from moe_jax.errors import InputError
from moe_jax.nn.context import Context
from moe_jax.training.objectives import Distil
from moe_jax.training.start import save_model
from tests import tiny
from tests.adapt import models
from tests.adapt.models import hashes, logits

BATCH = tiny.make_batch()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
  return str(save_model(tmp_path_factory.mktemp("teacher") / "t", models.model(), tiny.CONFIG))


def log_softmax(x):
  x = x.astype(np.float64)
  return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def test_the_loss_is_the_mix_of_hard_and_soft_targets(teacher):
  student = models.model(models.DENSE)
  own, targets = logits(student), logits(models.model())
  distil = Distil(teacher, temperature=2.0, soft=0.3)
  run = jax.jit(lambda student: [of(student, BATCH, Context()).loss for of in (distil, distil.evaluate)])
  loss, evaluated = run(student)  # without padding, as `logits`
  hard = -np.take_along_axis(log_softmax(own), BATCH["targets_BL"][..., None], -1)[..., 0]
  p, q = log_softmax(targets / 2), log_softmax(own / 2)
  soft = 4 * (np.exp(p) * (p - q)).sum(axis=-1)
  expected = ((0.7 * hard + 0.3 * soft) * BATCH["mask_BL"]).sum()
  np.testing.assert_allclose(loss, expected, rtol=1e-4)
  np.testing.assert_allclose(evaluated, (hard * BATCH["mask_BL"]).sum(), rtol=1e-4)


def test_distilling_a_model_into_itself_has_no_gradient(teacher):
  objective = Distil(teacher, temperature=3.0, soft=1.0)
  gradient = jax.jit(nnx.grad(lambda model: objective(model, BATCH, Context()).loss))
  largest = lambda model: max(
    float(abs(x).max()) for x in jax.tree.leaves(nnx.state(gradient(model), nnx.Param))
  )
  # Each of some hundred terms of the sum rounds, so zero is relative to the gradient of another model.
  assert largest(models.model()) < 1e-5 * largest(models.model(seed=1))


def test_a_dense_student_has_all_that_is_not_of_experts():
  before, after = hashes(models.model()), hashes(to_dense(models.model()))
  new = {f"{i}.ffn.{name}" for i in (0, 1) for name in ("w_gate_DF", "w_up_DF", "w_down_FD")}
  assert after.keys() - before.keys() == new
  assert all(after[path] == before[path] for path in after.keys() - new)
  assert {path.split(".")[1] for path in before.keys() - after.keys()} == {"ffn"}
  wide = to_dense(models.model(), dense_dim=24)
  assert wide.config.dense_dim == 24 and np.isfinite(logits(wide)).all()


@pytest.mark.parametrize(
  ("call", "match"),
  [
    (lambda t: Distil(), "objective distil: needs a teacher"),
    (lambda t: Distil(t, temperature=0.0), "temperature must be above 0, got 0.0"),
    (lambda t: Distil(t, soft=1.5), r"soft must be in \[0, 1\], got 1.5"),
    (lambda t: Distil("nowhere")(models.model(), BATCH, Context()), "nowhere: holds no run"),
    (lambda t: to_dense(models.model(models.DENSE)), "no layer with routed experts"),
  ],
)
def test_what_is_wrong_is_said_in_one_line(teacher, call, match):
  with pytest.raises(InputError, match=match):
    call(teacher)


def test_a_student_with_another_vocabulary_is_refused(teacher):
  student = lambda tokens_BL, context: (np.zeros((*tokens_BL.shape, 40), np.float32), ())
  with pytest.raises(InputError, match=r"the student has a vocabulary of 40 and the teacher .* one of 32"):
    Distil(teacher)(student, BATCH, Context())
