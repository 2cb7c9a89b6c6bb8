"""What runs after a step: once, on the new parameters, with the sums of the whole step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import InputError
from moe_jax.nn.aux import moe_auxes
from moe_jax.ops.balancing import Balancer
from moe_jax.training.checkpoint import Checkpoints
from moe_jax.training.compiled import resolve_config
from moe_jax.training.hooks import Hook
from tests import tiny

STEPS = 3
EXPERTS = tiny.CONFIG.model.moe.num_experts


class CountTokens(Hook):
  """As a user writes it: tokens per layer and expert since the start, and its own number of calls."""

  def init(self, model):
    return {"tokens_RE": jnp.zeros((tiny.CONFIG.model.num_layers, EXPERTS)), "calls": jnp.int32(0)}

  def __call__(self, model, state, aux):
    (layers,) = moe_auxes(aux)
    return {"tokens_RE": state["tokens_RE"] + layers.tokens_per_expert_BE, "calls": state["calls"] + 1}


def counts_updates() -> Balancer:
  return Balancer(
    init=lambda num_experts: (jnp.zeros(num_experts), jnp.int32(0)),
    update=lambda state, stats: (state[0], state[1] + 1),
  )


def _config(accumulation: int):
  return tiny.change(
    tiny.CONFIG,
    hooks=("average_parameters:decay=0.75", CountTokens),
    balancers=("switch_loss:0.1", counts_updates),
    accumulation=accumulation,
  )


@pytest.fixture(scope="module")
def states():
  """accumulation -> the states before and after each step."""
  found = {}
  for accumulation in (1, 2):
    mesh, steps = tiny._steps(_config(accumulation))
    with jax.set_mesh(mesh):
      state = steps.init(0)
      found[accumulation] = [jax.device_get(state)]
      for step in range(STEPS):
        state, _ = steps.train(state, tiny.make_batch(seed=step))
        found[accumulation].append(jax.device_get(state))
  return found


def test_average_parameters_is_the_recurrence(states):
  average = states[1][0].params
  for state in states[1]:  # the first is its own average
    average = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, average, state.params)
    jax.tree.map(
      lambda found, own: np.testing.assert_allclose(found, own, rtol=1e-5, atol=1e-7), state.hooks[0], average
    )
  last = states[1][-1]
  assert np.any(np.abs(last.hooks[0]["embedding_VD"][...] - last.params["embedding_VD"][...]) > 1e-4)


def test_hooks_see_the_sums_of_the_whole_step_once(states):
  tokens = sum(tiny.make_batch(seed=step)["mask_BL"].sum() for step in range(STEPS))
  for accumulation in (1, 2):
    counted = states[accumulation][-1].hooks[1]
    assert counted["calls"] == STEPS
    np.testing.assert_array_equal(counted["tokens_RE"].sum(axis=1), [2 * tokens] * 2)
  np.testing.assert_array_equal(states[1][1].hooks[1]["tokens_RE"], states[2][1].hooks[1]["tokens_RE"])


def test_balancers_update_once_per_step(states):
  for accumulation in (1, 2):
    for step, state in enumerate(states[accumulation]):
      updates = [x for x in jax.tree.leaves(state.variables) if x.dtype == jnp.int32]
      np.testing.assert_array_equal(updates, [[step] * 2])  # a number per layer


def test_hooks_survive_a_checkpoint(states, tmp_path):
  mesh, steps = tiny._steps(_config(1))
  state = states[1][-1]
  checkpoints = Checkpoints(tmp_path)
  with jax.set_mesh(mesh):
    checkpoints.save(STEPS, jax.device_put(state, steps.state_shardings), {})
    restored, _ = checkpoints.restore(steps.abstract_state, steps.state_shardings)
  checkpoints.close()
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), state)


def test_a_wrong_decay_is_named():
  for decay in (1.0, -0.5):
    with pytest.raises(InputError, match=r"--hooks=average_parameters.*decay must be in"):
      resolve_config(tiny.change(tiny.CONFIG, hooks=f"average_parameters:decay={decay}"))
