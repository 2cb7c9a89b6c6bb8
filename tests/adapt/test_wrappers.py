"""Adapters at zero are the identity, merged ones compute the same, and dropout goes on and off."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.adapt import add_adapters, merge_adapters, set_dropout, unwrap_experts, wrap_experts
from moe_jax.adapt.layers import put_together, take_apart
from moe_jax.errors import InputError
from moe_jax.nn.build import resolve
from moe_jax.nn.ffn import SHARED_EXPERTS
from moe_jax.training.optim import is_frozen
from moe_jax.training.selection import select_trained
from tests.adapt import models
from tests.adapt.models import hashes, logits, trained

# A layer without experts, and one with routed and shared ones, whose output a gate scales.
SHARED = dataclasses.replace(
  models.SPARSE, num_shared_experts=2, shared_expert_dim=6, shared_expert_gate=True
)
ALL_PARTS = dataclasses.replace(
  models.CONFIG, num_layers=2, num_dense_first=1, mixer="attention:window=4", moe=SHARED
)
PLACES = {
  "experts": ["1.ffn.experts."],
  "shared": ["1.ffn.shared."],
  "dense": ["0.ffn."],
  "attention": ["0.mixer.", "1.mixer."],
}


def close(a, b):
  np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("parts", [None, ["experts"], ["shared"], ["dense"], ["attention"]], ids=str)
def test_new_adapters_change_nothing_and_merged_ones_compute_the_same(parts):
  model = models.model(ALL_PARTS)
  adapted = add_adapters(model, rank=2, alpha=3.0, parts=parts)
  close(logits(adapted), logits(model))
  assert merge_adapters(adapted).config == model.config and hashes(merge_adapters(adapted)) == hashes(model)
  changed = trained(adapted)
  assert np.abs(logits(changed) - logits(model)).max() > 1e-3
  close(logits(merge_adapters(changed)), logits(changed))
  named = {place for part in parts or PLACES for place in PLACES[part]}
  found = {path.partition("adapters.")[0] for path in hashes(adapted) if ".adapters." in path}
  assert found == named


def test_the_name_adapters_trains_them_and_nothing_else():
  _, params, _ = nnx.split(
    select_trained(add_adapters(models.model(ALL_PARTS), rank=2), "adapters"), nnx.Param, ...
  )
  free = {path for path, variable in nnx.to_flat_state(params) if not is_frozen(variable)}
  assert free == {path for path, _ in nnx.to_flat_state(params) if "adapters" in path}
  # A and B of three matrices in each network of experts or dense part, and of four in each of two mixers.
  assert len(free) == 2 * (3 + 3 + 3 + 4 + 4)


def test_a_merged_matrix_is_the_sum_of_loops():
  parts = take_apart(trained(add_adapters(models.model(ALL_PARTS), rank=2, alpha=3.0)))
  merged = take_apart(merge_adapters(put_together(parts)))
  values, own = parts.layers[1].values, merged.layers[1].values
  w, a, b = (values[f"ffn.experts.{p}w_up_EDF"] for p in ("experts.", "adapters.down.", "adapters.up."))
  for e, d, f in ((0, 0, 0), (3, 5, 7), (7, 15, 15)):
    expected = w[e, d, f] + 3.0 / 2 * sum(float(a[e, d, r]) * float(b[e, r, f]) for r in range(2))
    np.testing.assert_allclose(own["ffn.experts.w_up_EDF"][e, d, f], expected, rtol=1e-5)
  w, a, b = (values[f"mixer.{p}w_out_NHD"] for p in ("mixer.", "adapters.down.", "adapters.up."))
  expected = w[1, 2, 3] + 3.0 / 2 * sum(float(a[1, 2, r]) * float(b[r, 3]) for r in range(2))
  np.testing.assert_allclose(own["mixer.w_out_NHD"][1, 2, 3], expected, rtol=1e-5)
  for layer, prefix in ((1, "ffn.shared."), (0, "ffn.")):
    values, own = parts.layers[layer].values, merged.layers[layer].values
    w, a, b = (values[f"{prefix}{p}w_down_FD"] for p in ("ffn.", "adapters.down.", "adapters.up."))
    assert w.shape == ((12, 16) if layer else (16, 16))
    for f, d in ((0, 0), (7, 3), (11, 15)):
      expected = w[f, d] + 3.0 / 2 * sum(float(a[f, r]) * float(b[r, d]) for r in range(2))
      np.testing.assert_allclose(own[f"{prefix}w_down_FD"][f, d], expected, rtol=1e-5)


def test_an_adapted_shared_expert_is_its_formula():
  """sigmoid(x g) (silu(x W_gate') * (x W_up')) W_down' with W' = W + alpha / rank * A B."""
  offered = {"dim": 5, "dense_dim": 4, "activation": "swiglu", "gate": True, "init_scale": 1.0}
  network = SHARED_EXPERTS.resolve("low_rank:rank=2:alpha=3")(**offered, rngs=nnx.Rngs(0))
  rng, w, flat = np.random.default_rng(0), {}, []
  for path, variable in nnx.to_flat_state(nnx.state(network)):
    w[path[-1], path[-2]] = value = rng.normal(size=variable.get_value().shape)
    flat.append((path, variable.replace(jnp.asarray(value, jnp.float32))))
  nnx.update(network, nnx.from_flat_state(flat))
  of = lambda name: w[name, "ffn"] + 3 / 2 * w[name, "down"] @ w[name, "up"]
  x_TD = rng.normal(size=(6, 5))
  sigmoid = lambda z: 1 / (1 + np.exp(-z))
  gate_TF = x_TD @ of("w_gate_DF")
  expected = (gate_TF * sigmoid(gate_TF) * (x_TD @ of("w_up_DF"))) @ of("w_down_FD")
  expected *= sigmoid(x_TD @ w["w_shared_gate_D", "ffn"])[:, None]
  np.testing.assert_allclose(network(x_TD.astype(np.float32))[0], expected, rtol=1e-4, atol=1e-4)


def test_dropout_around_experts_is_the_identity_in_evaluation_and_comes_off():
  model = models.model()
  wrapped = wrap_experts(model, "expert_dropout:rate=0.4")
  assert str(wrapped.config.moe.experts) == "expert_dropout"  # of the rate 0.4, which is its default
  np.testing.assert_array_equal(logits(wrapped), logits(model))
  assert hashes(unwrap_experts(wrapped)) == hashes(model)


def test_dropout_of_what_parts_add_goes_on_and_off():
  model = models.model()
  dropping = set_dropout(model, 0.1)
  assert str(dropping.config.residual) == "pre_norm:0.1"
  np.testing.assert_array_equal(logits(dropping), logits(model))
  again = set_dropout(dropping, 0.0)
  assert again.config == model.config and hashes(again) == hashes(model)


def test_wrappers_compose():
  model = models.model()
  both = wrap_experts(add_adapters(model, rank=2, parts=["experts"]), "expert_dropout:rate=0.1")
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
    (
      lambda m: add_adapters(models.model(models.DENSE), parts=["experts"]),
      "parts=experts: the model has no layer with routed experts; it has dense, attention",
    ),
    (lambda m: add_adapters(m, parts=["shared"]), "parts=shared: the model has no shared experts; it has"),
    (lambda m: add_adapters(m, parts=["share"]), "unknown part 'share': did you mean shared"),
    (lambda m: set_dropout(m, 1.0), r"dropout must be in \[0, 1\), got 1.0"),
    (
      lambda m: models.model(dataclasses.replace(models.CONFIG, ffn="low_rank:ffn=moe")),
      "ffn low_rank:ffn=moe: adapters of experts are --experts=low_rank",
    ),
    (
      lambda m: resolve(
        dataclasses.replace(models.CONFIG, moe=dataclasses.replace(SHARED, shared_experts="low_rank:rank=0"))
      ),
      "--shared_experts=low_rank:0: shared_experts low_rank:ffn=mlp: rank must be at least 1, got 0",
    ),
  ],
)
def test_what_is_wrong_is_said_in_one_line(call, match):
  with pytest.raises(InputError, match=match) as error:
    call(models.model())
  assert "\n" not in str(error.value)
