"""Adaptations of a published checkpoint, saved in its own form and as the folder of a run."""

import dataclasses

import numpy as np
import pytest

import moe_jax
from moe_jax import adapt
from moe_jax.errors import InputError
from moe_jax.training.start import save_model
from tests import tiny
from tests.adapt import models
from tests.adapt.models import hashes


def test_a_pruned_checkpoint_is_saved_and_loads_bit_equal(tmp_path):
  original = models.model(dataclasses.replace(models.CONFIG, moe=models.SPARSE))  # what Mixtral computes
  moe_jax.save(original, tmp_path / "published")
  loaded = moe_jax.load(tmp_path / "published")
  assert hashes(loaded.model) == hashes(original)
  found = adapt.calibrate(loaded.model, [tiny.make_batch()])
  pruned = adapt.prune(loaded.model, {i: layer.output_norm_E for i, layer in found.items()}, 6)
  moe_jax.save(pruned, tmp_path / "pruned")
  save_model(tmp_path / "run", pruned, loaded.config, loaded.tokenizer)
  for folder in ("pruned", "run"):
    again = moe_jax.load(tmp_path / folder)
    assert hashes(again.model) == hashes(pruned) and again.config.model.moe.num_experts == 6
  with pytest.raises(
    InputError, match="no published family computes what this model does; the nearest is mixtral"
  ):
    moe_jax.save(adapt.merge(loaded.model, found, 6), tmp_path / "merged")
  assert np.isfinite(models.logits(pruned)).all()
