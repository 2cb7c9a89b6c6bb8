"""Fewer experts: what must not change anything, what statistics are, and what a merged expert is."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from flax import nnx

from moe_jax.adapt import calibrate, losses, merge, prune
from moe_jax.adapt.experts import groups_of, merged, select
from moe_jax.adapt.layers import put_together, take_apart
from moe_jax.adapt.routes import changed_routes, max_vio, selected
from moe_jax.errors import InputError
from tests import tiny
from tests.adapt import models
from tests.adapt.models import hashes, logits

E, D, F = 8, 16, 16
# Sigmoids do not depend on which other experts there are, so a bias moves the same choices after pruning.
MOE = dataclasses.replace(
  models.SPARSE, router="sigmoid_topk:normalize=true", balancers="loss_free_bias:0.01", num_shared_experts=1
)
BIASED = dataclasses.replace(models.CONFIG, moe=MOE)
BATCH = tiny.make_batch()


@pytest.fixture(scope="module")
def model():
  """Its biases are not zero, and move choices."""
  return with_layers(
    models.model(BIASED),
    lambda i, layer: layer._replace(values=layer.values | {"ffn.balancer_state": biased(layer)}),
  )


@pytest.fixture(scope="module")
def found(model):
  return calibrate(model, [BATCH])


def biased(layer):
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: x if np.shape(x) != (E,) else rng.normal(size=E).astype(x.dtype) / 10,
    layer.values["ffn.balancer_state"],
  )


def with_layers(model, change):
  parts = take_apart(model)
  return put_together(parts._replace(layers=tuple(change(i, layer) for i, layer in enumerate(parts.layers))))


def close(a, b):
  np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def test_permuting_experts_with_what_the_router_has_of_them_changes_nothing(model):
  rng = np.random.default_rng(1)
  permuted = with_layers(model, lambda i, layer: select(layer, rng.permutation(E)))
  close(logits(permuted), logits(model))
  assert hashes(permuted) != hashes(model)
  router_only = {"ffn.router.w_router_DE"}
  wrong = with_layers(
    model,
    lambda i, layer: layer._replace(
      values={
        p: x if p in router_only else select(layer, np.arange(E)[::-1]).values[p]
        for p, x in layer.values.items()
      }
    ),
  )
  assert np.abs(logits(wrong) - logits(model)).max() > 1e-2  # the law can fail


def never_chosen(layer, experts):
  """A layer whose router never chooses `experts`: the residual stream is normed, so a large bias cannot be beaten."""
  bias = jax.tree.map(
    lambda x: np.where(np.isin(np.arange(E), experts), -9.0, x).astype(x.dtype) if np.shape(x) == (E,) else x,
    biased(layer),
  )
  return layer._replace(values=layer.values | {"ffn.balancer_state": bias})


def test_pruning_experts_that_are_never_chosen_changes_nothing(model):
  unused = with_layers(model, lambda i, layer: never_chosen(layer, [1, 4 + i]))
  statistics = calibrate(unused, [BATCH])
  for i in (0, 1):
    np.testing.assert_array_equal(np.flatnonzero(statistics[i].tokens_E == 0), [1, 4 + i])
  for scores in ("tokens_E", "weights_E", "output_norm_E"):
    small = prune(unused, {i: getattr(found, scores) for i, found in statistics.items()}, 6)
    assert small.config.moe.num_experts == 6
    close(logits(small), logits(unused))


def test_losing_an_expert_that_is_never_chosen_costs_nothing_and_others_cost_what_zeros_cost(model):
  unused = with_layers(model, lambda i, layer: never_chosen(layer, [1]))
  costs = losses(unused, [BATCH])
  assert costs[0][1] == costs[1][1] == 0 and np.count_nonzero(costs[0]) == 7
  zero = lambda path, x: (
    np.where((np.arange(E) == 3)[:, None, None], 0, x) if path.startswith("ffn.experts.") else x
  )
  without = with_layers(
    unused,
    lambda i, layer: layer._replace(values={p: zero(p, x) if i == 1 else x for p, x in layer.values.items()}),
  )

  def nll(model):
    log_probs = jax.nn.log_softmax(logits(model))
    picked = np.take_along_axis(np.asarray(log_probs), BATCH["targets_BL"][..., None], -1)[..., 0]
    return -(picked * BATCH["mask_BL"]).sum() / BATCH["mask_BL"].sum()

  # `logits` has no mask, which attends to nothing later and routes padding only
  np.testing.assert_allclose(costs[1][3], nll(without) - nll(unused), rtol=2e-3, atol=2e-5)


def test_statistics_of_a_layer_equal_loops(model, found):
  """The first layer, whose input is attention on the embedding, both of which we take from the model's own modules."""
  parts = take_apart(model)
  x_BLD, values = first_input(model), parts.layers[0].values
  bias_E = next(x for x in jax.tree.leaves(values["ffn.balancer_state"]) if np.shape(x) == (E,))
  tokens, norms = np.zeros(E), np.zeros(E)
  every = []
  for b, t in itertools.product(range(8), range(16)):
    if not BATCH["mask_BL"][b, t]:
      continue
    x = np.float64(x_BLD[b, t])
    logits_E = x @ values["ffn.router.w_router_DE"]
    every.append(logits_E)
    probs = 1 / (1 + np.exp(-logits_E))
    chosen = np.argsort(-(probs + bias_E))[:2]
    for e in chosen:
      gate, up = x @ values["ffn.experts.w_gate_EDF"][e], x @ values["ffn.experts.w_up_EDF"][e]
      y = (gate / (1 + np.exp(-gate)) * up) @ values["ffn.experts.w_down_EFD"][e]
      tokens[e] += 1
      norms[e] += probs[e] / probs[chosen].sum() * np.linalg.norm(y)
  np.testing.assert_array_equal(found[0].tokens_E, tokens)
  np.testing.assert_allclose(found[0].output_norm_E, norms / np.maximum(tokens, 1), rtol=1e-4)
  np.testing.assert_allclose(
    found[0].logit_correlation_EE, np.corrcoef(np.array(every).T), rtol=1e-3, atol=1e-4
  )


def first_input(model):
  from moe_jax.nn.context import Context

  segment = model.segments[0]
  graphdef, stacked = nnx.split(segment.pattern)
  block = nnx.merge(graphdef, jax.tree.map(lambda x: x[0], stacked)).blocks[0]
  x_BLD = model.embedding_VD[...][BATCH["tokens_BL"]]
  x_BLD, _ = block.mixer_residual(block.mixer, x_BLD, Context())
  return np.asarray(block.ffn_residual.norm(x_BLD))


def copied(layer, of_E, shuffle=False):
  """A layer in which expert e is expert of_E[e], perhaps with its hidden units in another order."""
  values, rng = dict(layer.values), np.random.default_rng(2)
  orders = [rng.permutation(F) if shuffle else np.arange(F) for _ in range(E)]
  for path in ("w_gate_EDF", "w_up_EDF", "w_down_EFD"):
    w = layer.values[f"ffn.experts.{path}"]
    axis = 0 if path == "w_down_EFD" else 1
    values[f"ffn.experts.{path}"] = np.stack([np.take(w[of], orders[e], axis) for e, of in enumerate(of_E)])
  return layer._replace(values=values)


PAIRS = np.array([0, 0, 1, 1, 2, 2, 3, 3])


@pytest.mark.parametrize("router", ["softmax_topk", "softmax_topk:softmax=before", "sigmoid_topk"])
def test_merging_equal_experts_with_the_mass_of_the_router_kept_changes_nothing(router):
  config = dataclasses.replace(BIASED, moe=dataclasses.replace(BIASED.moe, balancers="none", router=router))
  equal = with_layers(models.model(config), lambda i, layer: copied(layer, PAIRS, shuffle=True))
  usage = np.arange(E, 0, -1.0)
  small = with_layers(
    equal, lambda i, layer: merged(layer, PAIRS, usage, usage, align=True, keep_router=True)
  )
  assert (
    small.config.moe.num_experts == 4
    and take_apart(small).layers[0].values["ffn.experts.w_up_EDF"].shape[0] == 4
  )
  close(logits(small), logits(equal))
  unaligned = with_layers(
    equal, lambda i, layer: merged(layer, PAIRS, usage, usage, align=False, keep_router=True)
  )
  assert np.abs(logits(unaligned) - logits(equal)).max() > 1e-3


def test_a_token_counts_once_for_an_expert_that_both_its_choices_stand_for():
  """In the first layer, whose choices are those before experts 2 e and 2 e + 1 were merged into e."""
  model = models.model(dataclasses.replace(BIASED, moe=dataclasses.replace(MOE, balancers="none")))
  usage = np.ones(E)
  small = with_layers(
    model, lambda i, layer: merged(layer, PAIRS, usage, usage, align=False, keep_router=True)
  )
  of_pairs_BLEX = selected(model, BATCH)[0].reshape(8, 16, 4, 2)
  chosen_BLE = of_pairs_BLEX.max(axis=-1)
  assert of_pairs_BLEX.sum(axis=-1).max() == 2
  np.testing.assert_array_equal(selected(small, BATCH)[0], chosen_BLE)
  np.testing.assert_array_equal(changed_routes(small, small, [BATCH]), [0, 0])
  np.testing.assert_array_equal(calibrate(small, [BATCH])[0].tokens_E, chosen_BLE.sum(axis=(0, 1)))
  computed_E = of_pairs_BLEX.sum(axis=(0, 1, 3))
  np.testing.assert_allclose(max_vio(small, [BATCH])[0], computed_E.max() / computed_E.mean() - 1, rtol=1e-6)


def test_a_merged_expert_is_the_weighted_mean_of_its_group(model):
  layer = take_apart(model).layers[1]
  usage = np.array([4.0, 1, 1, 3, 2, 2, 5, 0])
  small = merged(layer, PAIRS, usage, usage, align=False, keep_router=False)
  for path in ("ffn.experts.w_up_EDF", "ffn.experts.w_down_EFD"):
    w = layer.values[path]
    np.testing.assert_allclose(small.values[path][1], (w[2] + 3 * w[3]) / 4, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(small.values[path][3], w[6], rtol=1e-6)
  columns = layer.values["ffn.router.w_router_DE"]
  np.testing.assert_allclose(
    small.values["ffn.router.w_router_DE"][:, 0], (4 * columns[:, 0] + columns[:, 1]) / 5, rtol=1e-5
  )


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"router": "averaged", "similarity": "columns"},
    {"weights": "equal", "similarity": "weights", "align": False},
  ],
  ids=str,
)
def test_merging_gives_a_model_that_runs_and_keeps_all_else(options, found):
  model = models.model(dataclasses.replace(BIASED, moe=dataclasses.replace(BIASED.moe, balancers="none")))
  small = merge(model, found, 4, **options)
  assert np.isfinite(logits(small)).all()
  before, after = hashes(model), hashes(small)
  kept = {path for path in before if ".experts." not in path and ".router." not in path}
  assert all(after[path] == before[path] for path in kept)


def test_others_join_the_leader_they_resemble():
  usage = np.array([5.0, 1.0, 9.0, 2.0])
  similarity = np.array([[1, 0.9, 0, 0.2], [0.9, 1, 0.1, 0], [0, 0.1, 1, 0.8], [0.2, 0, 0.8, 1]])
  np.testing.assert_array_equal(groups_of(usage, similarity, 2), [0, 0, 1, 1])


@pytest.mark.parametrize(
  ("call", "match"),
  [
    (
      lambda m, f: prune(m, {0: np.ones(E), 1: np.ones(E)}, 9),
      "num_experts=9: layer 0 has 8 experts and a token takes 2",
    ),
    (lambda m, f: merge(m, f, 1), "num_experts=1: layer 0 has 8"),
    (lambda m, f: merge(m, f, 4, weights="size"), "weights must be one of usage, equal, got 'size'"),
    (
      lambda m, f: calibrate(m, [BATCH], min_tokens=999),
      "the busiest expert of a layer sees .* at least 999",
    ),
    (lambda m, f: calibrate(models.model(models.DENSE), [BATCH]), "no layer with routed experts"),
  ],
)
def test_what_is_wrong_is_said_in_one_line(model, found, call, match):
  with pytest.raises(InputError, match=match):
    call(model, found)
