"""Adaptations of a published checkpoint, saved in its own form and as the folder of a run."""

import dataclasses
import re

import numpy as np
import pytest

import moe_jax
from moe_jax import adapt
from moe_jax.errors import InputError
from moe_jax.models import preset
from moe_jax.nn.build import resolve
from moe_jax.training.start import save_model
from tests import tiny
from tests.adapt import models
from tests.adapt.models import hashes, trained
from tests.interop.helpers import random_model


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


@pytest.mark.parametrize(("name", "num_layers"), [("deepseek_v2_lite_tiny", 2), ("qwen15_moe_a27b_tiny", 1)])
def test_adapters_of_a_published_model_with_shared_experts_are_merged_into_it(name, num_layers, tmp_path):
  """DeepSeek-V2-Lite has a first layer without experts, too, and Qwen1.5-MoE a gate."""
  config = dataclasses.replace(preset(name).model, num_layers=num_layers, remat="none")
  moe_jax.save(random_model(resolve(config)), tmp_path / "published")
  loaded = moe_jax.load(tmp_path / "published")
  adapted = adapt.add_adapters(loaded.model, rank=2)
  places = {
    re.sub(r"^\d\.", "", path).partition(".adapters.")[0] for path in hashes(adapted) if ".adapters." in path
  }
  assert places == {"mixer", "ffn.experts", "ffn.shared", *(["ffn"] if config.num_dense_first else [])}
  changed = trained(adapted)
  save_model(tmp_path / "run", changed, loaded.config, loaded.tokenizer)
  merged = adapt.merge_adapters(moe_jax.load(tmp_path / "run").model)
  assert merged.config == loaded.config.model
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())
  close(models.logits(adapted), models.logits(loaded.model))
  close(models.logits(merged), models.logits(changed))
  assert np.abs(models.logits(changed) - models.logits(adapted)).max() > 1e-3
  moe_jax.save(merged, tmp_path / "merged")
  assert hashes(moe_jax.load(tmp_path / "merged").model) == hashes(merged)
  with pytest.raises(InputError, match="no published family computes what this model does"):
    moe_jax.save(changed, tmp_path / "unmerged")
