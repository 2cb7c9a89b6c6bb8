"""Every published model trains at toy size, with everything it has."""

import functools

import jax
import numpy as np
import pytest

from moe_jax import sharding
from moe_jax.config import MeshConfig
from moe_jax.models import PRESETS, PUBLISHED
from moe_jax.training.compiled import make_init, make_train_step, resolve_config
from tests import tiny

VOCAB, LENGTH, BATCH = 40, 32, 4
# Models of one structure are compiled once.
SAME = {
  "mixtral_8x22b": "mixtral_8x7b",
  "qwen15_moe_a27b": "qwen2_57b_a14b",
  "qwen3_235b_a22b": "qwen3_30b_a3b",
  "gpt_oss_120b": "gpt_oss_20b",
}
NAMES = [name for name in PUBLISHED if name not in SAME]


def config_of(name: str):
  fields = {"sequence_length": LENGTH, "batch_size": BATCH, "num_steps": 10, "remat": "none"}
  return tiny.change(PRESETS[f"{name}_tiny"], mesh=tiny.ONE_DEVICE, **fields)


def initial_state(config):
  """Drawn by NumPy: compiling the initialisers of every model would take as long as its step."""
  rng, abstract = np.random.default_rng(0), jax.eval_shape(make_init(config, VOCAB), 0)
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
  draw = lambda x: (rng.normal(size=x.shape) / np.sqrt(x.shape[-2] if x.ndim > 1 else 1)).astype(np.float32)
  return zeros._replace(params=jax.tree.map(draw, zeros.params))


def make_batch():
  rng = np.random.default_rng(0)
  window = rng.integers(0, VOCAB, (BATCH, LENGTH + 1)).astype(np.int32)
  mask_BL = np.ones((BATCH, LENGTH), bool)
  mask_BL[1, 20:] = False
  batch = {"tokens_BL": window[:, :-1], "targets_BL": window[:, 1:], "mask_BL": mask_BL}
  return batch | {"domain_B": np.zeros(BATCH, np.int32)}


@functools.cache
def train_step(name: str):
  return jax.jit(make_train_step(resolve_config(config_of(name)), VOCAB, 1, gradients=True))


@pytest.mark.parametrize("name", NAMES)
def test_two_steps_lower_the_loss_and_reach_every_parameter(name):
  config = resolve_config(config_of(name))
  batch = make_batch()
  step = train_step(name)
  state, losses, reached = initial_state(config), [], []
  for _ in range(2):
    state, metrics = jax.device_get(step(state, batch))
    losses.append(float(metrics["loss"]))
    reached.append(jax.tree.map(lambda g: np.any(g != 0), metrics["gradients"]))
  assert losses[1] < losses[0], losses
  used = jax.tree.leaves_with_path(jax.tree.map(np.logical_or, *reached))
  assert not [jax.tree_util.keystr(path) for path, is_used in used if not is_used]


def test_a_mesh_gives_the_same_step():
  """DeepSeek-V3's: latent attention, node-limited routing, biases, and a module of multi-token prediction."""
  config, batch = resolve_config(config_of("deepseek_v3")), make_batch()
  state = initial_state(config)
  expected, wanted = jax.device_get(train_step("deepseek_v3")(state, batch))
  mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
  shardings = sharding.state_shardings(mesh, state)
  with jax.set_mesh(mesh):
    step = jax.jit(make_train_step(config, VOCAB, 1, gradients=True))
    spread = jax.device_put(state, shardings), jax.device_put(batch, sharding.batch_sharding(mesh))
    found, metrics = jax.device_get(step(*spread))
  np.testing.assert_allclose(metrics["total_loss"], wanted["total_loss"], rtol=1e-5)
  jax.tree.map(np.testing.assert_array_equal, found.variables, expected.variables)
  for (path, g), (_, h) in zip(
    jax.tree.leaves_with_path(metrics["gradients"]),
    jax.tree.leaves_with_path(wanted["gradients"]),
    strict=True,
  ):
    np.testing.assert_allclose(
      g, h, rtol=1e-3, atol=1e-4 * np.abs(h).max(), err_msg=jax.tree_util.keystr(path)
    )
