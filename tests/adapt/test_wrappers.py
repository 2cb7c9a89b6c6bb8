"""Adapters at zero are the identity, merged ones compute the same, and dropout goes on and off."""

import dataclasses

import numpy as np
import pytest

from moe_jax.adapt import add_adapters, merge_adapters, unwrap_experts, wrap_experts
from moe_jax.adapt.layers import put_together, take_apart
from moe_jax.errors import InputError
from tests.adapt import models
from tests.adapt.models import hashes, logits

WINDOWED = dataclasses.replace(models.CONFIG, mixer="attention:window=4")


def close(a, b):
  np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def trained(model):
  """`model` with adapters that are not zero."""
  parts, rng = take_apart(model), np.random.default_rng(0)
  draw = lambda path, x: rng.normal(size=x.shape).astype(np.float32) / 4 if ".up." in path else x
  layers = [
    layer._replace(values={path: draw(path, x) for path, x in layer.values.items()}) for layer in parts.layers
  ]
  return put_together(parts._replace(layers=tuple(layers)))


@pytest.mark.parametrize("options", [{}, {"attention": False}, {"experts": False}], ids=str)
def test_new_adapters_change_nothing_and_merged_ones_compute_the_same(options):
  model = models.model(WINDOWED)
  adapted = add_adapters(model, rank=2, alpha=3.0, **options)
  close(logits(adapted), logits(model))
  assert merge_adapters(adapted).config == model.config and hashes(merge_adapters(adapted)) == hashes(model)
  changed = trained(adapted)
  assert np.abs(logits(changed) - logits(model)).max() > 1e-2
  close(logits(merge_adapters(changed)), logits(changed))


def test_a_merged_matrix_is_the_sum_of_loops():
  parts = take_apart(trained(add_adapters(models.model(), rank=2, alpha=3.0)))
  merged = take_apart(merge_adapters(put_together(parts)))
  values, own = parts.layers[1].values, merged.layers[1].values
  w, a, b = (values[f"ffn.experts.{p}w_up_EDF"] for p in ("experts.", "adapters.down.", "adapters.up."))
  for e, d, f in ((0, 0, 0), (3, 5, 7), (7, 15, 15)):
    expected = w[e, d, f] + 3.0 / 2 * sum(float(a[e, d, r]) * float(b[e, r, f]) for r in range(2))
    np.testing.assert_allclose(own["ffn.experts.w_up_EDF"][e, d, f], expected, rtol=1e-5)
  w, a, b = (values[f"mixer.{p}w_out_NHD"] for p in ("mixer.", "adapters.down.", "adapters.up."))
  expected = w[1, 2, 3] + 3.0 / 2 * sum(float(a[1, 2, r]) * float(b[r, 3]) for r in range(2))
  np.testing.assert_allclose(own["mixer.w_out_NHD"][1, 2, 3], expected, rtol=1e-5)


def test_dropout_around_experts_is_the_identity_in_evaluation_and_comes_off():
  model = models.model()
  wrapped = wrap_experts(model, "expert_dropout:rate=0.4")
  assert str(wrapped.config.moe.experts) == "expert_dropout"  # of the rate 0.4, which is its default
  np.testing.assert_array_equal(logits(wrapped), logits(model))
  assert hashes(unwrap_experts(wrapped)) == hashes(model)


def test_wrappers_compose():
  model = models.model()
  both = wrap_experts(add_adapters(model, rank=2, attention=False), "expert_dropout:rate=0.1")
  assert "experts=low_rank;2" in str(both.config.moe.experts)
  close(logits(both), logits(model))
  assert hashes(merge_adapters(unwrap_experts(both))) == hashes(model)


@pytest.mark.parametrize(
  ("call", "match"),
  [
    (lambda m: add_adapters(m, rank=17), "rank=17: at most 16, the smaller side of"),
    (lambda m: add_adapters(m, rank=0), "rank must be at least 1, got 0"),
    (lambda m: merge_adapters(m), "the model has no low-rank adapters"),
    (lambda m: add_adapters(add_adapters(m, rank=2)), "has adapters already"),
    (lambda m: wrap_experts(m, "expert_dropout:experts=relu"), "experts is given twice"),
    (lambda m: wrap_experts(m, "swiglu"), "swiglu"),
    (lambda m: add_adapters(models.model(models.DENSE)), "no layer with routed experts"),
  ],
)
def test_what_is_wrong_is_said_in_one_line(call, match):
  with pytest.raises(InputError, match=match) as error:
    call(models.model())
  assert "\n" not in str(error.value)
