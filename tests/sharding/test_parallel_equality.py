"""A training step is the same on every mesh: dispatchers x axes x devices compared with one device.

The full product would compile for an hour. The rows cover it: every axis alone, every pair of axes in some triple
on eight devices, axes of size 4 and 8, and every dispatcher with the axes that its code knows (fsdp, expert,
tensor), alone and together. Where axes are together, the forward pass is recomputed, as it is for users.
"""

import functools

import jax
import numpy as np
import pytest

from moe_jax import sharding
from moe_jax.config import MeshConfig
from moe_jax.training.compiled import check_run, compile_steps
from tests import tiny

EMPTY, CROWDED = 3, 0  # experts: one without any token, one with more than its slots hold

CONFIG = tiny.change(
  tiny.CONFIG,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  num_shared_experts=1,  # a dense feed-forward block, too
  balancers="switch_loss:0.1,loss_free_bias:0.01",
  jitter=0.0,  # draws on meshes: tests/training/test_invariance.py
)
name_of = lambda spec: spec.partition(":")[0]
DROPS, DROPLESS = ("sorted", "einsum", "all_to_all"), ("dropless", "all_gather")

# Devices along each mesh axis -> the dispatchers that run on it.
MATRIX = [
  ({"slice": 2}, ("sorted",)),
  ({"data": 2}, ("dropless",)),
  ({"fsdp": 2}, ("einsum",)),
  ({"expert": 2}, ("all_gather",)),
  ({"tensor": 2}, ("all_to_all",)),
  ({"expert": 2, "tensor": 2}, ("dropless",)),
  ({"slice": 2, "data": 2, "fsdp": 2}, ("sorted",)),
  ({"slice": 2, "expert": 2, "tensor": 2}, ("einsum",)),
  ({"data": 2, "expert": 2, "tensor": 2}, ("all_to_all:chunks=2",)),
  ({"fsdp": 2, "expert": 2, "tensor": 2}, ("dropless", "all_gather")),
  ({"fsdp": 8}, ("all_to_all",)),
  ({"expert": 8}, ("dropless",)),
  ({"expert": 2, "tensor": 4}, ("sorted",)),  # more devices than key-value heads: those are whole
]
ROWS = [(sizes, dispatcher) for sizes, dispatchers in MATRIX for dispatcher in dispatchers]


def _mesh(**sizes: int) -> MeshConfig:
  return MeshConfig(**{"data": 1} | sizes)


@functools.cache
def _initial_state():
  """On one device, with biases of the choice that crowd one expert and starve another, in every layer."""
  config = tiny.change(CONFIG, mesh=_mesh())
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    state = compile_steps(config, tiny.VOCAB, tiny.DOMAINS, mesh).init(0)

  def push(bias_RE):
    assert bias_RE.shape == (2, 8)
    bias_RE = np.asarray(bias_RE) + 0.1 * (np.arange(8) == CROWDED) - 10.0 * (np.arange(8) == EMPTY)
    return bias_RE.astype(np.float32)

  return jax.device_get(state._replace(variables=jax.tree.map(push, state.variables)))


def step_on(dispatcher: str, sizes: dict[str, int]) -> dict:
  """Metrics, gradients and balancer state after one step on a mesh, as numpy."""
  remat = "full" if len(sizes) > 1 else "none"
  config = tiny.change(CONFIG, dispatcher=dispatcher, mesh=_mesh(**sizes), remat=remat)
  mesh = sharding.make_mesh(config.mesh)
  check_run(config, mesh)
  with jax.set_mesh(mesh):
    steps = compile_steps(config, tiny.VOCAB, tiny.DOMAINS, mesh, gradients=True)
    state = jax.device_put(_initial_state(), steps.state_shardings)
    batch = jax.device_put(tiny.make_batch(), sharding.batch_sharding(mesh))
    state, metrics = steps.train(state, batch)
    gradients = metrics.pop("gradients")
    return jax.device_get({"metrics": metrics, "gradients": gradients, "balancer": state.variables})


@functools.cache
def on_one_device(drops: bool) -> dict:
  return step_on("sorted" if drops else "dropless", {})


def test_loads_are_uneven_and_one_expert_is_empty():
  """Otherwise the tests below would compare less than they say."""
  for drops in (True, False):
    metrics = on_one_device(drops)["metrics"]
    tokens_RE = metrics["tokens_per_expert"]
    assert np.all(tokens_RE[:, EMPTY] == 0)
    assert np.all(tokens_RE.max(axis=1) > 1.5 * tokens_RE.mean(axis=1))
    assert np.all(metrics["dropped_fraction"] > 0.05) == drops
    assert np.all(metrics["switch_loss"] > 0.1)


@pytest.mark.parametrize(
  ("sizes", "dispatcher"),
  ROWS,
  ids=lambda value: (
    value if isinstance(value, str) else ".".join(f"{axis}{size}" for axis, size in value.items())
  ),
)
def test_step_is_the_same(sizes, dispatcher):
  tiny.assert_same(step_on(dispatcher, sizes), on_one_device(name_of(dispatcher) in DROPS))


def test_the_rows_cover_axes_pairs_and_dispatchers():
  axes = sharding.MESH_AXES
  alone = {next(iter(sizes)) for sizes, _ in ROWS if len(sizes) == 1}
  pairs = {frozenset((a, b)) for sizes, _ in ROWS if len(sizes) > 1 for a in sizes for b in sizes if a != b}
  assert alone == set(axes)
  assert pairs == {frozenset((a, b)) for a in axes for b in axes if a != b}
  assert {int(np.prod(list(sizes.values()))) for sizes, _ in ROWS} == {2, 4, 8}
  for dispatcher in (*DROPS, *DROPLESS):
    used = {axis for sizes, name in ROWS if name_of(name) == dispatcher for axis in sizes}
    assert used >= {"fsdp", "expert", "tensor"}, dispatcher


def test_the_check_can_fail():
  """Steps that drop and steps that do not are told apart."""
  with pytest.raises(AssertionError):
    tiny.assert_same(on_one_device(True), on_one_device(False))
