"""Schedules and AdamW against values and formulas by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from moe_jax.config import OptimizerConfig
from moe_jax.nn.experts import EXPERTS
from moe_jax.nn.routers.zero_computation import ZeroComputation
from moe_jax.nn.variables import freeze
from moe_jax.training.optim import learning_rate_schedule, make_optimizer, trained
from tests import tiny


@pytest.mark.parametrize(
  ("schedule", "decay"),
  [
    ("constant", lambda part: 1.0),
    ("linear", lambda part: 1.0 - 0.9 * part),
    ("cosine", lambda part: 0.1 + 0.9 * (1 + np.cos(np.pi * part)) / 2),
  ],
)
def test_schedules(schedule, decay):
  """4 steps of warm-up, then 8 of decay, at whose end is the final fraction."""
  config = OptimizerConfig(learning_rate=2.0, schedule=schedule, warmup_steps=4)
  rates = [float(learning_rate_schedule(config, 12)(step)) / 2.0 for step in range(13)]
  np.testing.assert_allclose(rates[:4], [0.25, 0.5, 0.75, 1.0], rtol=1e-6)
  np.testing.assert_allclose(rates[4:], [decay(step / 8) for step in range(9)], rtol=1e-6)
  assert rates[12] == pytest.approx(1.0 if schedule == "constant" else 0.1)


@pytest.mark.parametrize(
  ("warmup", "num_steps", "expected"),
  [(20, 6, [1 / 3, 2 / 3, 1, 1, 0.7, 0.4]), (0, 3, [1, 0.7, 0.4]), (20, 1, [1])],
)
def test_warm_up_takes_at_most_half_of_the_steps(warmup, num_steps, expected):
  config = OptimizerConfig(learning_rate=1.0, schedule="linear", warmup_steps=warmup)
  schedule = learning_rate_schedule(config, num_steps)
  np.testing.assert_allclose([schedule(step) for step in range(num_steps)], expected, rtol=1e-6)


def _flat(tree) -> dict[str, np.ndarray]:
  """path -> float64."""
  leaves = jax.tree.leaves_with_path(jax.device_get(tree))
  return {jax.tree_util.keystr(path): np.asarray(leaf, np.float64) for path, leaf in leaves}


def test_steps_are_those_of_adamw_by_hand():
  """Of the gradients that the step reports: clipped first, at the logged learning rate, norms without decay."""
  fields = {"beta1": 0.8, "beta2": 0.99, "weight_decay": 0.3, "clip_norm": 0.05, "num_steps": 4}
  fields |= {"learning_rate": 0.01, "schedule": "linear", "warmup_steps": 2}
  mesh, steps = tiny._steps(tiny.change(tiny.CONFIG, **fields))
  rates = [0.005, 0.01, 0.01, 0.0055]
  with jax.set_mesh(mesh):
    state = steps.init(0)
    params = _flat(state.params)
    mean, square = (dict.fromkeys(params, 0.0) for _ in range(2))
    for step, rate in enumerate(rates, start=1):
      batch = tiny.make_batch(seed=step)
      batch["mask_BL"][: 2 * step - 2] = (
        False  # so that norms differ, and with them what clipping does to Adam's means
      )
      state, metrics = steps.train(state, batch)
      gradients = _flat(metrics["gradients"])
      norm = np.sqrt(sum(np.sum(g**2) for g in gradients.values()))
      assert norm > 0.1
      np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)  # before clipping
      np.testing.assert_allclose(metrics["learning_rate"], rate, rtol=1e-6)
      for name, g in gradients.items():
        g = g * 0.05 / norm
        mean[name] = 0.8 * mean[name] + 0.2 * g
        square[name] = 0.99 * square[name] + 0.01 * g**2
        direction = mean[name] / (1 - 0.8**step) / (np.sqrt(square[name] / (1 - 0.99**step)) + 1e-8)
        decay = 0.0 if "norm" in name else 0.3
        params[name] = params[name] - rate * (direction + decay * params[name])
      for name, found in _flat(state.params).items():
        np.testing.assert_allclose(found, params[name], rtol=1e-5, atol=2e-6, err_msg=name)


class _Pair(nnx.Module):
  def __init__(self):
    self.free = nnx.Param(jnp.asarray([[3.0, 4.0]]), logical_axes=("a", "b"), num_in=1)
    self.held = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    for param in (self.held.kernel, self.held.bias):
      param.set_metadata(logical_axes=("a", "b"), num_in=1)
    freeze(self.held)


@pytest.mark.parametrize(
  (
    "name",
    "held",
    "state_max",
  ),  # after clipping the gradient is (3, 4) / 5; AdamW averages gradients, Muon sums them
  [
    ("adamw", 1e6, 0.1 * 0.8),
    ("adamw", np.nan, 0.1 * 0.8),
    ("adamw", np.inf, 0.1 * 0.8),
    ("muon", np.nan, 0.8),
  ],
)
def test_frozen_parameters_stay_and_count_in_no_norm(name, held, state_max):
  """Whatever their gradients are."""
  config = OptimizerConfig(name, clip_norm=1.0, weight_decay=0.5, warmup_steps=0)
  params = nnx.state(_Pair(), nnx.Param)
  optimizer = make_optimizer(config, 10)
  gradients = jax.tree.map(jnp.copy, params)
  for name in ("kernel", "bias"):
    gradients["held"][name] = gradients["held"][name].replace(jnp.full_like(params["held"][name], held))
  gradients = trained(gradients)
  assert optax.tree.norm(gradients) == pytest.approx(5.0)
  state = optimizer.init(params)
  updates, state = optimizer.update(gradients, state, params)
  moved = optax.apply_updates(params, updates)
  jax.tree.map(np.testing.assert_array_equal, moved["held"], params["held"])
  assert np.all(moved["free"][...] != params["free"][...])
  assert max(float(x.max()) for x in jax.tree.leaves(state) if x.ndim > 1) == pytest.approx(state_max)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize(
  ("make", "decaying"),
  [
    (lambda rngs: EXPERTS["clipped_swiglu"](2, 4, 6, rngs=rngs), {"w_gate_EDF", "w_up_EDF", "w_down_EFD"}),
    (lambda rngs: ZeroComputation(("constant", "constant"), 4, rngs=rngs), {"w_mix_DZ2"}),
  ],
  ids=["biases of experts", "vectors of MoE++"],
)
def test_vectors_do_not_decay(name, make, decaying):
  """Their shapes are those of matrices. Without gradients, only what decays moves."""
  params = jax.tree.map(jnp.ones_like, nnx.state(make(nnx.Rngs(0)), nnx.Param))
  optimizer = make_optimizer(OptimizerConfig(name, weight_decay=0.5, warmup_steps=0), 10)
  updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
  moved = {path for path, update in nnx.to_flat_state(updates) if np.any(update.get_value() != 0)}
  assert moved == {(w,) for w in decaying}
