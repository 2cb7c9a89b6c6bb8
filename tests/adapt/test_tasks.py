"""Task-level routing from token-level: the K likeliest experts of a domain, which alone compute the same for it."""

import numpy as np
import pytest
from flax import nnx

from moe_jax.adapt import calibrate, prune, to_task_level
from moe_jax.adapt.routes import selected
from moe_jax.errors import InputError
from moe_jax.inference.evaluate import _nll  # of each sequence
from tests import tiny
from tests.adapt import models

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
