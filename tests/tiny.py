"""A model that compiles in seconds, and one training step of it, for the invariance tests."""

import dataclasses
import functools

import jax
import numpy as np

from moe_jax import sharding
from moe_jax.comparison.arms import with_arm
from moe_jax.config import (
  Config,
  DataConfig,
  MeshConfig,
  ModelConfig,
  MoEConfig,
  OptimizerConfig,
  TrainConfig,
)
from moe_jax.training.compiled import compile_steps

VOCAB, DOMAINS = 32, 2
ONE_DEVICE = MeshConfig(data=1, expert=1)

CONFIG = Config(
  model=ModelConfig(
    num_layers=2,
    model_dim=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    dense_dim=16,
    remat="none",  # compiles a sixth faster; that recomputation changes nothing: tests/training/test_invariance.py
    moe=MoEConfig(
      num_experts=8,
      num_experts_per_token=2,
      expert_dim=16,
      # all kinds of state and scope at once
      balancers="switch_loss:0.05,switch_loss:0.05:scope=sequence,z_loss:0.005,loss_free_bias:0.01",
      dispatcher="sorted",
      capacity_factor=1.0,  # some assignments drop
      jitter=0.1,
    ),
  ),
  optimizer=OptimizerConfig(clip_norm=0.0),
  data=DataConfig(
    dataset="markov", markov_states=VOCAB, markov_domains=DOMAINS, sequence_length=16, batch_size=8
  ),
  train=TrainConfig(num_steps=4, log_every=1, tensorboard=False),
  mesh=ONE_DEVICE,
)


def change(config: Config, **fields) -> Config:
  """`config` with fields replaced, each found by its name in whichever part has it."""
  mesh = fields.pop("mesh", config.mesh)
  return dataclasses.replace(with_arm(config, fields), mesh=mesh)


class StopsAt:
  """Stands for the progress display of a run that the user stops. Step 0: never."""

  def __init__(self, step):
    self.step, self.notes = step, []

  def start_run(self, label, num_steps, first_step=0): ...

  def finish_run(self): ...

  def note(self, text):
    self.notes.append(text)

  def update(self, step, *numbers):
    if step == self.step:
      raise KeyboardInterrupt


def make_batch(rows: int = 8, length: int = 16, seed: int = 0) -> dict[str, np.ndarray]:
  """Random tokens; two of the sequences end in padding."""
  rng = np.random.default_rng(seed)
  window = rng.integers(0, VOCAB, (rows, length + 1)).astype(np.int32)
  mask = np.ones((rows, length), bool)
  mask[1, length // 2 :] = False
  mask[5, length - 3 :] = False
  domain = (np.arange(rows) % DOMAINS).astype(np.int32)
  return {"tokens_BL": window[:, :-1], "targets_BL": window[:, 1:], "mask_BL": mask, "domain_B": domain}


@functools.cache
def _steps(config: Config):
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    return mesh, compile_steps(config, VOCAB, DOMAINS, mesh, gradients=True)


def one_step(config: Config, batch: dict[str, np.ndarray]) -> dict:
  """Metrics, gradients and balancer state after one step from the initial state, as numpy.

  The state is that of one device: compiling the initialisers for every mesh takes as long as a step.
  """
  mesh, steps = _steps(config)
  with jax.set_mesh(mesh):
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    state = jax.device_put(_initial_state(change(config, mesh=ONE_DEVICE)), steps.state_shardings)
    state, metrics = steps.train(state, batch)
    gradients = metrics.pop("gradients")
    return jax.device_get({"metrics": metrics, "gradients": gradients, "balancer": state.variables})


def _initial_state(config: Config):
  mesh, steps = _steps(config)
  with jax.set_mesh(mesh):
    return jax.device_get(steps.init(0))


def assert_same(actual: dict, expected: dict, rtol: float = 2e-5) -> None:
  """Equal up to the rounding of float32 sums in another order; balancer states exactly."""
  jax.tree.map(np.testing.assert_array_equal, actual["balancer"], expected["balancer"])
  for part in ("metrics", "gradients"):
    for (path, a), (_, b) in zip(
      jax.tree.leaves_with_path(actual[part]), jax.tree.leaves_with_path(expected[part]), strict=True
    ):
      scale = max(float(np.nanmax(np.abs(b))), 1e-3)
      np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * scale, err_msg=jax.tree_util.keystr(path))
