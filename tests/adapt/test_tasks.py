"""Task-level routing from token-level: the K likeliest experts of a domain, which alone compute the same for it."""

import csv

import numpy as np
import pytest
from flax import nnx

from moe_jax.adapt import calibrate, prune, to_task_level
from moe_jax.adapt.routes import selected
from moe_jax.errors import InputError
from moe_jax.inference.evaluate import _nll  # of each sequence
from moe_jax.training.compiled import make_model, resolve_config
from moe_jax.training.start import save_model
from tests import tiny
from tests.adapt import models
from tests.scripts import assert_one_line, run_scripts

BATCH = tiny.make_batch()


def of_domain(domain):
  return BATCH | {"mask_BL": BATCH["mask_BL"] & (BATCH["domain_B"] == domain)[:, None]}


@pytest.fixture(scope="module")
def found():
  return [calibrate(models.model(), [of_domain(domain)]) for domain in (0, 1)]


def test_the_mean_distribution_is_that_of_the_router(found):
  both = calibrate(models.model(), [BATCH])
  tokens = [of_domain(domain)["mask_BL"].sum() for domain in (0, 1)]
  for i in (0, 1):
    np.testing.assert_allclose(both[i].probability_E.sum(), 1, rtol=1e-5)
    mixed = sum(n * domain[i].probability_E for n, domain in zip(tokens, found, strict=True)) / sum(tokens)
    np.testing.assert_allclose(both[i].probability_E, mixed, rtol=1e-4)


def test_a_token_takes_the_likeliest_experts_of_its_domain_and_needs_no_others(found):
  model = to_task_level(models.model(), found)
  chosen_RBLE = selected(model, BATCH)
  for b, domain in enumerate(BATCH["domain_B"]):
    for i in (0, 1):
      best = np.sort(np.argsort(-found[domain][i].probability_E)[:2])
      for t in np.flatnonzero(BATCH["mask_BL"][b]):
        np.testing.assert_array_equal(np.flatnonzero(chosen_RBLE[i, b, t]), best)
  nll = lambda model: np.asarray(_nll(*nnx.split(model), BATCH, BATCH["mask_BL"], tiny.DOMAINS))
  for domain in (0, 1):
    scores = {i: layer.probability_E for i, layer in found[domain].items()}
    own = BATCH["domain_B"] == domain
    np.testing.assert_allclose(nll(prune(model, scores, 2))[own], nll(model)[own], rtol=1e-5)
  before = models.hashes(models.model())
  after = models.hashes(model)
  assert {path for path in before if before[path] != after.get(path)} == {
    f"{i}.ffn.router.w_router_DE" for i in (0, 1)
  }


def test_no_domain_is_refused():
  with pytest.raises(InputError, match="needs a calibration of each domain, got none"):
    to_task_level(models.model(), [])


@pytest.mark.slow
def test_a_task_that_is_held_out_gets_the_experts_of_all_text(tmp_path):
  fields = {
    "dataset": "stdlib_tasks",
    "held_out_tasks": "name",
    "sequence_length": 64,
    "objective": "response",
  }
  fields |= {"balancers": "none", "dispatcher": "dropless", "jitter": 0.0, "num_layers": 1}
  config = resolve_config(tiny.change(tiny.CONFIG, **fields))
  model = save_model(tmp_path / "m", make_model(config, 264), config)
  script = ["experiments/compress.py", f"--model={model}", "--batches=1", "--calibration=1", "--experts=4"]
  of_domain, all_tasks, trip = run_scripts(
    [*script, "--methods=usage", "--domain=name", f"--output_dir={tmp_path}/none"],
    [*script, "--methods=task_level", f"--output_dir={tmp_path}/out"],
    ["experiments/round_trip.py", "--preset=tiny", "--dataset=stdlib_tasks", "--held_out_tasks=name", "--domain=name",
     f"--output_dir={tmp_path}/none"],
  )  # fmt: skip
  for ended in (of_domain, trip):
    assert_one_line(ended, "--domain=name: has no training text, as tasks that are held out; choose one of ")
  assert not (tmp_path / "none" / "runs").exists()
  assert all_tasks.status == 0, all_tasks.stderr
  assert "note: task_level: no training text of name, which get the experts of all text" in all_tasks.stderr
  with open(tmp_path / "out" / "compress.csv", newline="") as file:
    assert [row["method"] for row in csv.DictReader(file)] == ["whole", "task_level"]
