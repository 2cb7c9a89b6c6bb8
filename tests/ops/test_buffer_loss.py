"""The scope `buffer` (2501.11873): load of the step's micro-batches up to this one, empty at every new step."""

import functools

import jax
import numpy as np
import pytest

from moe_jax import sharding
from moe_jax.ops.balancing import Balancer, make_balancer
from moe_jax.ops.balancing.common import normalized_scores, token_mean
from moe_jax.types import StepStats
from tests import tiny
from tests.ops.balancer_laws import logits_of, routing_of, selected
from tests.ops.balancer_rows import E, K
from tests.reference import balancing as reference
from tests.reference import deepseek_losses as further

WEIGHT, PIECES = 0.1, 4
SCOPES = ("buffer", "micro_batch", "global_batch")
NAMES = ("switch_loss", "switch_loss#2", "switch_loss#3")  # as metrics call them


# --- as a function ---


def micro_batches():
  """Three micro-batches of 4 x 6 tokens with padding, each with a favourite expert of its own."""
  for m in range(3):
    logits_BLE = logits_of(seed=m) + 2 * np.eye(E, dtype=np.float32)[m]
    mask_BL = np.random.default_rng(m).random(logits_BLE.shape[:2]) < 0.7
    yield logits_BLE, mask_BL, selected("softmax", logits_BLE, mask_BL)


@functools.partial(jax.value_and_grad, argnums=1)
def loss_and_gradient(balancer, logits_BLE, mask_BL, chosen, so_far):
  # What the whole step holds must not matter: one pass, nothing from the future.
  stats = StepStats(jax.tree.map(lambda leaf: leaf * np.nan, so_far), so_far)
  (value,) = balancer.losses(((),), routing_of("softmax", logits_BLE, mask_BL, chosen), stats).values()
  return value


@pytest.mark.parametrize("name", ["switch_loss", "gshard_loss"])
def test_each_micro_batch_sees_the_load_so_far(name):
  balancer = make_balancer(f"{name}:1:buffer")
  load_k = K if name == "switch_loss" else 1
  counts_JE, probs_JE, found, so_far = [], [], [], None
  for logits_BLE, mask_BL, chosen in micro_batches():
    observed = balancer.observe(((),), routing_of("softmax", logits_BLE, mask_BL, chosen))
    so_far = jax.tree.map(np.add, so_far, observed) if so_far else observed
    value, gradient = loss_and_gradient(balancer, logits_BLE, mask_BL, chosen, so_far)
    found.append(value)
    counts_JE.append(reference.selected(logits_BLE, mask_BL, load_k, "softmax").sum(axis=(0, 1)))
    probs_JE.append(np.asarray(jax.nn.softmax(logits_BLE.astype(float)))[mask_BL].mean(axis=0))
  np.testing.assert_allclose(found, further.buffer_losses(counts_JE, probs_JE), rtol=1e-5)
  # The gradient of the last one goes through the probabilities alone, towards experts that had little so far.
  load_E = np.sum(counts_JE, axis=0) / np.sum(counts_JE)
  probs_BLE = np.asarray(jax.nn.softmax(logits_BLE))
  want = E * probs_BLE * (load_E - (probs_BLE @ load_E)[..., None]) / mask_BL.sum() * mask_BL[..., None]
  np.testing.assert_allclose(gradient, want, atol=1e-6)


# --- in training ---


def config_of(accumulation):
  """Three losses side by side; no jitter and hardly any learning, so that steps can be compared."""
  spec = ",".join(f"switch_loss:{WEIGHT}:{scope}" for scope in SCOPES)
  return tiny.change(tiny.CONFIG, balancers=spec, accumulation=accumulation, jitter=0.0, learning_rate=1e-30)


def train_steps(config, batches):
  """The metrics of consecutive steps."""
  mesh, steps = tiny._steps(config)
  found = []
  with jax.set_mesh(mesh):
    state = steps.init(0)
    for batch in batches:
      state, metrics = steps.train(state, jax.device_put(batch, sharding.batch_sharding(mesh)))
      found.append({name: np.asarray(metrics[name]) for name in NAMES})
  return found


def rows_of(batch, rows):
  return {name: value[rows] for name, value in batch.items()}


@pytest.fixture(scope="module")
def micro_batch_routing():
  """(counts, probabilities, tokens) of each micro-batch alone, [J, R, E], [J, R, E] and [J], read by a probe."""

  def probe():
    def losses(state, routing, step_stats):
      counts_E, probs_BLE = routing.selected_BLE.sum(axis=(0, 1)), normalized_scores(routing)
      experts = range(counts_E.size)
      found = {f"count{e}": counts_E[e] for e in experts}
      return found | {f"prob{e}": token_mean(probs_BLE[..., e], routing) for e in experts}

    return Balancer(losses=losses)

  config = tiny.change(tiny.CONFIG, balancers=probe, jitter=0.0, batch_size=8 // PIECES)
  batch = tiny.make_batch()
  micros = [rows_of(batch, slice(m, None, PIECES)) for m in range(PIECES)]  # as the train step cuts
  metrics = [tiny.one_step(config, micro)["metrics"] for micro in micros]
  read = lambda kind: np.array(
    [[m[f"probe/{kind}{e}"] for e in range(config.model.moe.num_experts)] for m in metrics]
  ).swapaxes(1, 2)
  return read("count"), read("prob"), np.array([micro["mask_BL"].sum() for micro in micros])


def test_training_equals_the_papers_buffer(micro_batch_routing):
  counts_JRE, probs_JRE, tokens_J = micro_batch_routing
  (metrics,) = train_steps(config_of(PIECES), [tiny.make_batch()])
  share_J = tokens_J / tokens_J.sum()
  for layer in range(counts_JRE.shape[1]):
    counts_JE, probs_JE = counts_JRE[:, layer], probs_JRE[:, layer]
    buffer = share_J @ further.buffer_losses(counts_JE, probs_JE)
    alone = share_J @ [further.buffer_losses([c], [p])[0] for c, p in zip(counts_JE, probs_JE)]
    whole = share_J @ [further.buffer_losses([counts_JE.sum(axis=0)], [p])[0] for p in probs_JE]
    found = [metrics[name][layer] for name in NAMES]
    np.testing.assert_allclose(found, WEIGHT * np.array([buffer, alone, whole]), rtol=1e-5)
    # The first micro-batch sees itself, the last one the whole step: between the other two.
    assert alone - 0.01 > buffer > whole + 0.002


def test_the_order_of_micro_batches_matters():
  """Only for the buffer, which sees what came before."""
  batch = tiny.make_batch()
  forward, backward = train_steps(config_of(PIECES), [batch, rows_of(batch, slice(None, None, -1))])
  changed = [np.abs(forward[name] - backward[name]).max() > 1e-5 for name in NAMES]
  assert changed == [True, False, False]


def test_the_buffer_is_empty_at_each_step():
  """A step gives the same after any other step."""
  first, other, again = train_steps(
    config_of(PIECES), [tiny.make_batch(), tiny.make_batch(seed=1), tiny.make_batch()]
  )
  for name in NAMES:
    np.testing.assert_allclose(again[name], first[name], rtol=1e-6)
    assert np.abs(other[name] - first[name]).max() > 1e-5


def test_without_accumulation_it_is_the_global_batch():
  (metrics,) = train_steps(config_of(1), [tiny.make_batch()])
  for name in NAMES[1:]:
    np.testing.assert_allclose(metrics[name], metrics["switch_loss"], rtol=1e-6)
