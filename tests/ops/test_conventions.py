"""Compares the converter with the loss of each codebase, written out as in that codebase."""

import functools
import math

import numpy as np
import pytest

from moe_jax.errors import InputError
from moe_jax.ops.balancing import conventions
from moe_jax.ops.balancing.conventions import (
  CONVENTIONS,
  LOSSES,
  Z_CONVENTIONS,
  convert,
  per_layer_weight,
  value_at_balance,
)
from tests.scripts import ROOT, assert_one_line, run_scripts

SHAPES = [(8, 2, 32), (4, 1, 1), (16, 4, 3), (64, 8, 5)]
every_shape = pytest.mark.parametrize(("e", "k", "layers"), SHAPES)


def sizes(e, k, layers):
  return {"num_experts": e, "num_experts_per_token": k, "num_layers": layers}


def counts_of(chosen_TK, e):
  return np.bincount(np.ravel(chosen_TK), minlength=e)


# --- load-balancing losses: (probs_RTE, chosen_RTK best first) of R layers -> the loss with coefficient 1 ---


def summed(layer_loss):
  return lambda probs_RTE, chosen_RTK: sum(map(layer_loss, probs_RTE, chosen_RTK))


def averaged(layer_loss):
  return lambda probs_RTE, chosen_RTK: np.mean(list(map(layer_loss, probs_RTE, chosen_RTK)))


def gshard(probs_TE, chosen_TK):
  s, e = probs_TE.shape
  c_E, m_E = counts_of(chosen_TK[:, 0], e), probs_TE.mean(axis=0)
  return 1 / e * np.sum(c_E / s * m_E)


def mesh_tensorflow(probs_TE, chosen_TK):
  e = probs_TE.shape[1]
  density_E = np.eye(e)[chosen_TK[:, 0]].mean(axis=0)
  return np.mean(probs_TE.mean(axis=0) * density_E) * float(e * e)


def switch(probs_TE, chosen_TK):
  t, n = probs_TE.shape
  return n * sum((chosen_TK[:, 0] == i).sum() / t * probs_TE[:, i].sum() / t for i in range(n))


def flaxformer(probs_TE, chosen_TK):
  e = probs_TE.shape[1]
  mask_TE = np.eye(e)[chosen_TK].max(axis=1)
  return np.mean(mask_TE.mean(axis=0) * probs_TE.mean(axis=0)) * e**2


def megatron(probs_TE, chosen_TK):
  t, e = probs_TE.shape
  topk = chosen_TK.shape[1]
  return np.sum(probs_TE.sum(axis=0) * counts_of(chosen_TK, e)) * (e / (topk * t * t))


def maxtext(probs_TE, chosen_TK):
  e = probs_TE.shape[1]
  density_E = np.eye(e)[chosen_TK].sum(axis=1).mean(axis=0)
  return np.mean(density_E * probs_TE.mean(axis=0)) * e**2


def levanter(probs_TE, chosen_TK):
  e = probs_TE.shape[1]
  loads_E = counts_of(chosen_TK, e) / counts_of(chosen_TK, e).sum()
  f_E = loads_E * e / chosen_TK.shape[1]
  return np.sum(f_E * probs_TE.mean(axis=0))


def olmo_core(probs_RTE, chosen_RTK):
  weight, total = 1 / len(probs_RTE), 0.0
  for probs_TE, chosen_TK in zip(probs_RTE, chosen_RTK):
    t, e = probs_TE.shape
    total += weight * e / chosen_TK.shape[1] * np.dot(counts_of(chosen_TK, e), probs_TE.mean(axis=0)) / t
  return total


def megablocks(probs_RTE, chosen_RTK):
  n, t, e = probs_RTE.shape
  scores = np.concatenate(list(probs_RTE), axis=1).mean(axis=0)
  tokens_per_expert = np.concatenate([counts_of(chosen_TK, e) for chosen_TK in chosen_RTK])
  return e / (n * t * chosen_RTK.shape[2]) * np.dot(tokens_per_expert, scores)


def hugging_face(probs_RTE, chosen_RTK):
  e = probs_RTE.shape[2]
  mask_KE = np.eye(e)[np.concatenate(list(chosen_RTK))].mean(axis=0)
  return np.sum(mask_KE * np.concatenate(list(probs_RTE)).mean(axis=0)[None]) * e


def deepseek(probs_TE, chosen_TK):
  t, e = probs_TE.shape
  f_E = e / (chosen_TK.shape[1] * t) * counts_of(chosen_TK, e)
  return np.sum(f_E * probs_TE.mean(axis=0))


def ours(probs_TE, chosen_TK, k=None):
  """switch_loss; with k=1 gshard_loss."""
  e = probs_TE.shape[1]
  counts_E = counts_of(chosen_TK[:, :k], e)
  return e * np.sum(counts_E / counts_E.sum() * probs_TE.mean(axis=0))


ORACLES = {
  "moe_jax": summed(ours),
  "gshard": summed(gshard),
  "mesh_tensorflow": summed(mesh_tensorflow),
  "switch": summed(switch),
  "flaxformer": averaged(flaxformer),
  "megatron_lm": summed(megatron),
  "maxtext": averaged(maxtext),
  "levanter": summed(levanter),
  "olmo_core": olmo_core,
  "megablocks": megablocks,
  "hugging_face": hugging_face,
  "deepseek": summed(deepseek),
}
OURS = {"all": summed(ours), "first": summed(functools.partial(ours, k=1))}

# --- router z-losses: logits_RTE, K -> the loss with coefficient 1 ---


def lse2(logits_TE):
  return np.log(np.exp(logits_TE).sum(axis=-1)) ** 2


Z_ORACLES = {
  "moe_jax": lambda x_RTE, k: sum(lse2(x).mean() for x in x_RTE),
  # `loss += moe_z_loss * z_loss` in the gating, and then `loss * moe_loss_coef` in the layer.
  "mesh_tensorflow": lambda x_RTE, k: 0.01 * sum(lse2(x).sum() / len(x) for x in x_RTE),
  "flaxformer": lambda x_RTE, k: np.mean([lse2(x).sum() / len(x) for x in x_RTE]),
  "megatron_lm": lambda x_RTE, k: sum(lse2(x).mean() for x in x_RTE),
  "levanter": lambda x_RTE, k: sum(lse2(x).mean() for x in x_RTE),
  "olmo_core": lambda x_RTE, k: sum(1 / len(x_RTE) * lse2(x).sum() / len(x) for x in x_RTE),
  "megablocks_fork": lambda x_RTE, k: lse2(np.concatenate(x_RTE)).sum() / (len(x_RTE) * len(x_RTE[0]) * k),
}


def balanced(e, k, layers):
  """Token t takes experts t, t+1, ..., t+K-1, with falling probabilities: peaked, yet balanced."""
  t, i = np.arange(e)[:, None], np.arange(e)[None]
  probs_TE = np.exp(-(((i - t) % e) / 2.0))
  probs_TE /= probs_TE.sum(axis=1, keepdims=True)
  chosen_TK = (t + np.arange(k)[None]) % e
  return np.stack([probs_TE] * layers), np.stack([chosen_TK] * layers)


def random(e, k, layers, tokens=6, seed=0):
  """Unbalanced: experts differ in popularity, layers differ."""
  x_RTE = np.random.default_rng(seed).normal(size=(layers, tokens, e)) + np.linspace(1, -1, e)[None, None]
  probs_RTE = np.exp(x_RTE) / np.exp(x_RTE).sum(axis=-1, keepdims=True)
  return probs_RTE, np.argsort(-probs_RTE, axis=-1)[..., :k]


def gradient(loss, probs_RTE, chosen_RTK):
  """With respect to the probabilities. Exact: load fractions are constants, so losses are linear in them."""
  found = np.zeros_like(probs_RTE)
  for index in np.ndindex(*probs_RTE.shape):
    step = np.zeros_like(probs_RTE)
    step[index] = 1
    found[index] = loss(probs_RTE + step, chosen_RTK) - loss(probs_RTE, chosen_RTK)
  return found


def test_every_convention_has_an_oracle_and_a_source():
  assert set(ORACLES) == set(CONVENTIONS)
  assert set(Z_ORACLES) == {name for name, c in Z_CONVENTIONS.items() if c.layers != "caller"}
  for registry in LOSSES.values():
    for c in registry.values():
      assert c.layers in conventions.LAYERS and c.source and c.checked and c.accumulation and c.setting
  assert {c.counts for c in CONVENTIONS.values()} == set(OURS)


@every_shape
@pytest.mark.parametrize("name", ORACLES)
def test_value_at_balance(name, e, k, layers):
  want = ORACLES[name](*balanced(e, k, layers))
  np.testing.assert_allclose(value_at_balance(name, **sizes(e, k, layers)), want, rtol=1e-12)


@every_shape
@pytest.mark.parametrize("name", Z_ORACLES)
def test_z_loss_in_units_of_the_mean(name, e, k, layers):
  logits_RTE = np.random.default_rng(0).normal(size=(layers, 5, e))
  want = Z_ORACLES[name](logits_RTE, k) / lse2(logits_RTE).mean()
  np.testing.assert_allclose(value_at_balance(name, **sizes(e, k, layers), loss="z"), want, rtol=1e-12)


@every_shape
@pytest.mark.parametrize("loss", LOSSES)
def test_there_and_back(loss, e, k, layers):
  shape = sizes(e, k, layers) | {"loss": loss}
  names = [name for name, c in LOSSES[loss].items() if c.layers != "caller"]
  for a in names:
    assert convert(0.01, a, a, **shape) == pytest.approx(0.01, rel=1e-15)
    for b in names:
      there = convert(0.01, a, b, **shape)
      assert convert(there, b, a, **shape) == pytest.approx(0.01, rel=1e-14)
      one, other = per_layer_weight(0.01, a, **shape), per_layer_weight(there, b, **shape)
      assert other == pytest.approx(one, rel=1e-14)


FIGURES = {
  "megatron_lm": ("0.01", 0.01),
  "levanter": ("0.005", 0.01 / 2),
  "maxtext": ("0.0006", 0.01 * 2 / 32),
  "olmo_core": ("0.0003", 0.01 / 32),
}


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("e", [8, 64])
def test_what_a_hundredth_means_on_32_layers_with_top_2(name, e):
  figure, exact = FIGURES[name]
  one = per_layer_weight(0.01, name, **sizes(e, 2, 32))
  assert one == pytest.approx(exact, rel=1e-15)
  assert f"{one:.1g}" == figure


@pytest.mark.parametrize("name", CONVENTIONS)
def test_the_converted_weight_gives_our_gradients(name):
  e, k, layers = 4, 2, 1 if CONVENTIONS[name].layers == "pooled" else 3
  routing = random(e, k, layers)
  weight = convert(0.01, name, "moe_jax", **sizes(e, k, layers))
  want = 0.01 * gradient(ORACLES[name], *routing)
  got = weight * gradient(OURS[CONVENTIONS[name].counts], *routing)
  np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-15)
  assert np.abs(want).max() > 1e-5


def test_pooling_is_a_mean_where_layers_route_alike_and_hides_collapse_where_not():
  e, k = 4, 2
  alike = tuple(np.concatenate([x] * 3) for x in random(e, k, 1))
  mean = averaged(ours)
  np.testing.assert_allclose(gradient(hugging_face, *alike), k * gradient(mean, *alike), rtol=1e-9)
  # Layer 0 uses only experts 0 and 1, layer 1 only 2 and 3.
  chosen_RTK = np.broadcast_to(np.array([[0, 1], [2, 3]])[:, None], (2, 6, 2))
  probs_RTE = np.eye(e)[chosen_RTK].sum(axis=2) / 2
  np.testing.assert_allclose(hugging_face(probs_RTE, chosen_RTK), k)  # as if balanced
  np.testing.assert_allclose(mean(probs_RTE, chosen_RTK), e / k)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: convert(0.01, "megatron", "moe_jax", **sizes(8, 2, 4)), "did you mean megatron_lm"),
    (lambda: convert(0.01, "moe_jax", "olmo", **sizes(8, 2, 4)), "unknown convention of the load-balancing"),
    (lambda: value_at_balance("gshard", **sizes(8, 2, 4), loss="z"), "unknown convention of the z loss"),
    (lambda: value_at_balance("moe_jax", **sizes(8, 2, 4), loss="y"), "loss must be one of"),
    (lambda: value_at_balance("megablocks", **sizes(8, 2, 4), loss="z"), "olmo_core if it averages them"),
    (lambda: value_at_balance("moe_jax", **sizes(2, 3, 4)), "num_experts_per_token=3, num_experts=2"),
    (lambda: convert(math.nan, "switch", "moe_jax", **sizes(8, 2, 4)), "weight must be finite"),
  ],
)
def test_wrong_input_gets_one_line(call, message):
  with pytest.raises(InputError) as error:
    call()
  assert message in str(error.value) and len(str(error.value).splitlines()) == 1


# --- the script and its page ---


def test_the_script_prints_the_page_and_converts_and_answers_a_wrong_name_with_one_line():
  convert_one = ["--source=levanter", "--target=hugging_face", "--num_layers=4", "--weight=0.5"]
  arguments = [], convert_one, ["--source=megatron"], ["--target=switch"]
  tables, converted, *wrong = run_scripts(*(["scripts/coefficients.py", *args] for args in arguments))
  page = (ROOT / "docs/coefficients.md").read_text()
  assert "python scripts/coefficients.py" in page
  assert (tables.status, page[page.index("### ") :]) == (0, tables.stdout), tables.stderr
  assert converted.stdout == "0.5 in levanter is 0.5 in hugging_face (E = 8, K = 2, R = 4 layers)\n"
  for ended, message in zip(
    wrong, ("did you mean megatron_lm", "--target=switch: needs --source"), strict=True
  ):
    assert_one_line(ended, message)
