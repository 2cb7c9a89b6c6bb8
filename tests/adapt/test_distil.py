"""Distillation: soft targets against a loop, a model into itself, and the dense student."""

import csv
import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from moe_jax import disk
from moe_jax.adapt import to_dense
from moe_jax.data import load_dataset
from moe_jax.errors import InputError
from moe_jax.inference.evaluate import evaluate
from moe_jax.nn.context import Context
from moe_jax.training.compiled import make_model, resolve_config
from moe_jax.training.objectives import Distil, DistilResponse, Response
from moe_jax.training.start import save_model
from tests import tiny
from tests.adapt import models
from tests.adapt.models import hashes, logits
from tests.scripts import assert_one_line, run_scripts

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


def test_on_responses_only_they_count(teacher):
  is_target_BL = BATCH["mask_BL"] & (np.arange(16) % 3 == 0)
  prompts, responses = BATCH | {"is_target_BL": is_target_BL}, BATCH | {"mask_BL": is_target_BL}
  student, of_all, of_responses = models.model(models.DENSE), Distil(teacher), DistilResponse(teacher)
  run = jax.jit(lambda student: [
    of(student, batch, Context()).loss
    for of, batch in (
      (of_responses, prompts),
      (of_all, responses),  # whatever the mask leaves out
      (of_responses.evaluate, prompts),
      (Response(), prompts),
    )
  ])  # fmt: skip
  loss, expected, evaluated, likelihood = run(student)
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  np.testing.assert_allclose(evaluated, likelihood, rtol=1e-6)
  assert of_responses.num_targets(prompts) == is_target_BL.sum() < of_all.num_targets(prompts)
  with pytest.raises(InputError, match="the data has no responses"):
    of_responses(student, BATCH, Context())


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


def test_a_teacher_that_sees_later_tokens_is_refused(tmp_path):
  masked = resolve_config(tiny.change(tiny.CONFIG, objective="masked_lm"))
  folder = save_model(tmp_path / "masked", make_model(masked, tiny.VOCAB), masked)
  with pytest.raises(InputError, match=r"the teacher .*masked sees later tokens \(objective masked_lm\)"):
    Distil(str(folder))(models.model(), BATCH, Context())


def test_the_script_refuses_teachers_before_it_trains(tmp_path):
  of_dense = {"num_dense_first": 1, "dense_dim": 24, "capacity_factor": 2.0}
  makes = {"masked": {"objective": "masked_lm"}, "mixed": of_dense, "responses": {"objective": "response"}}
  for name, fields in makes.items():
    config = resolve_config(tiny.change(tiny.CONFIG, **fields))
    save_model(tmp_path / name, make_model(config, tiny.VOCAB), config)
  script = lambda name: [
    "experiments/distil.py",
    f"--model={tmp_path}/{name}",
    f"--output_dir={tmp_path}/out",
  ]
  masked, mixed, responses = run_scripts(*map(script, makes))
  assert_one_line(
    masked, f"--model={tmp_path}/masked: sees later tokens (objective masked_lm), so it predicts no"
  )
  assert_one_line(
    mixed, "a token meets layers of 24 and 32 hidden units, and a dense student has one width; choose a"
  )
  assert_one_line(responses, "was trained on responses, and its text (markov) has none; choose a model of")
  assert not list(tmp_path.glob("out/**/metrics.jsonl"))


@pytest.mark.slow
def test_teacher_and_students_are_measured_by_one_loss(tmp_path):
  """A teacher of responses, with a shared expert: students read responses, too, and are as wide as what a token meets."""
  fields = {
    "objective": "response",
    "dataset": "stdlib_tasks",
    "sequence_length": 64,
    "num_shared_experts": 1,
  }
  fields |= {"balancers": "none", "dispatcher": "dropless", "jitter": 0.0, "data_seed": 1, "num_layers": 1}
  config = resolve_config(tiny.change(tiny.CONFIG, **fields))
  teacher = make_model(config, 264)
  save_model(tmp_path / "t", teacher, config)
  script = ["experiments/distil.py", f"--model={tmp_path}/t", f"--output_dir={tmp_path}/out", "--seeds=2"]
  script += [
    "--num_steps=1",
    "--batch_size=4",
    "--eval_batches=2",
    "--tensorboard=false",
    "--data_parallelism=1",
  ]
  (done,) = run_scripts(script)
  assert done.status == 0, done.stderr
  results = [
    disk.read_object(path) for path in (tmp_path / "out" / "students" / "arms").glob("*/*/result.json")
  ]
  objectives = {result["arm"]: result["objective"].partition(":")[0] for result in results}
  hard, soft = "response", "distil_response"
  assert objectives == {"alone": hard, "init": hard, "soft": soft, "init_soft": soft, "init_mixed": soft}
  assert {result["config"]["model"]["dense_dim"] for result in results} == {3 * 16}
  with open(tmp_path / "out" / "kept.csv", newline="") as file:
    rows = list(csv.DictReader(file))
  data = dataclasses.replace(config.data, batch_size=4)
  expected = evaluate(teacher, load_dataset(data), 4, 2)["all"]
  np.testing.assert_allclose([float(row["teacher"]) for row in rows], expected.nll, rtol=1e-5)
  report = (tmp_path / "out" / "students" / "report.html").read_text()
  assert (
    "The student of seed 1 sees the training text in the order in which the teacher did, the others in"
    in report
  )
