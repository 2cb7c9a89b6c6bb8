"""Muon against a NumPy loop over single matrices, on the parameters of a whole model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax import sharding
from moe_jax.config import MeshConfig
from moe_jax.errors import InputError
from moe_jax.training.checkpoint import Checkpoints
from moe_jax.training.compiled import abstract_model, resolve_config
from moe_jax.training.muon import is_hidden_matrix
from moe_jax.training.optim import OPTIMIZERS, make_optimizer
from tests import tiny

CONFIG = tiny.change(
  tiny.CONFIG, optimizer="muon:momentum=0.9", weight_decay=0.3, learning_rate=0.01, schedule="constant",
  warmup_steps=0, expert_dim=24, num_kv_heads=2, num_shared_experts=1,
)  # fmt: skip
D, NH, F = 16, 16, 24
# Rows and columns of each hidden matrix. Axes of layers and experts come first in memory.
HIDDEN = {
  "w_query_DNH": (D, NH), "w_key_DNH": (D, NH), "w_value_DNH": (D, NH), "w_out_NHD": (NH, D),
  "w_gate_EDF": (D, F), "w_up_EDF": (D, F), "w_down_EFD": (F, D),
  "w_gate_DF": (D, F), "w_up_DF": (D, F), "w_down_FD": (F, D),
}  # fmt: skip


def _params() -> nnx.State:
  return nnx.state(abstract_model(resolve_config(CONFIG), tiny.VOCAB), nnx.Param)


def _draw(seed: int) -> nnx.State:
  """Values for every parameter."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), _params())


def _flat(tree) -> dict[str, np.ndarray]:
  """path -> float64."""
  return {
    jax.tree_util.keystr(path): np.asarray(leaf, np.float64) for path, leaf in jax.tree.leaves_with_path(tree)
  }


def _name(path: str) -> str:
  return next((name for name in HIDDEN if f"'{name}'" in path), "")


def _newton_schulz(m: np.ndarray) -> np.ndarray:
  x = m / np.linalg.norm(m)
  for _ in range(5):
    a = x @ x.T
    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
  return x


@pytest.fixture(scope="module")
def steps():
  """(parameters, gradients of two steps, optimizer, the updates of both steps)."""
  optimizer = make_optimizer(tiny.change(CONFIG, clip_norm=0.0).optimizer, 10)
  params, gradients = _draw(0), [_draw(1), _draw(2)]
  update, state, updates = jax.jit(optimizer.update), optimizer.init(params), []
  for g in gradients:
    found, state = update(g, state, params)
    updates.append(_flat(found))
  return params, gradients, update, updates, state


def test_every_update_is_that_of_the_loop_over_matrices(steps):
  """Hidden matrices by the formulas of 2507.20534, the rest as AdamW alone would."""
  params, gradients, _, updates, _ = steps
  adamw = OPTIMIZERS["adamw"](0.01, weight_decay=0.3, beta1=0.9, beta2=0.95)
  state, momentum, seen = adamw.init(params), {}, set()
  for g, found in zip(gradients, updates, strict=True):
    expected, state = adamw.update(g, state, params)
    expected = _flat(expected)
    for path, g_one in _flat(g).items():
      if name := _name(path):
        seen.add(name)
        momentum[path] = 0.9 * momentum.get(path, 0.0) + g_one
        rows, columns = HIDDEN[name]
        matrices = momentum[path].reshape(-1, rows, columns)
        direction = np.stack([_newton_schulz(m) for m in matrices]).reshape(g_one.shape)
        weights = _flat(params)[path]
        expected[path] = -0.01 * (direction * np.sqrt(max(rows, columns)) * 0.2 + 0.3 * weights)
      np.testing.assert_allclose(found[path], expected[path], rtol=1e-4, atol=2e-6, err_msg=path)
  assert seen == set(HIDDEN)


def test_singular_values_are_near_one(steps):
  """Of the direction of every matrix, except those that were nearly zero: five steps do not lift them to one."""
  params, gradients, _, (found, _), _ = steps
  gradients, params = _flat(gradients[0]), _flat(params)
  for path in filter(_name, found):
    rows, columns = HIDDEN[_name(path)]
    direction = (found[path] / -0.01 - 0.3 * params[path]) / (0.2 * np.sqrt(max(rows, columns)))
    shape = (-1, rows, columns)
    values = np.linalg.svd(direction.reshape(shape), compute_uv=False)
    before = np.linalg.svd(gradients[path].reshape(shape), compute_uv=False)
    lifted = before > 0.02 * np.linalg.norm(before, axis=-1, keepdims=True)
    assert lifted.mean() > 0.9 and np.all((values[lifted] > 0.6) & (values[lifted] < 1.25)), path


def test_experts_permute(steps):
  params, gradients, update, (expected, _), _ = steps
  order = np.random.default_rng(3).permutation(8)
  is_expert = lambda path: "_E" in _name(jax.tree_util.keystr(path))
  permute = lambda tree: jax.tree.map_with_path(lambda p, x: x[:, order] if is_expert(p) else x, tree)
  optimizer = make_optimizer(tiny.change(CONFIG, clip_norm=0.0).optimizer, 10)
  permuted = permute(params)
  found, _ = update(permute(gradients[0]), optimizer.init(permuted), permuted)
  for path, value in _flat(found).items():
    of_expert = "_E" in _name(path)
    np.testing.assert_allclose(value, expected[path][:, order] if of_expert else expected[path], atol=1e-7)


def test_a_mesh_gives_the_same_update_and_a_checkpoint_the_same_state(steps, tmp_path):
  """On fsdp, expert and tensor, which split rows, columns and the axis of experts."""
  params, gradients, _, (expected, _), _ = steps
  mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
  optimizer = make_optimizer(tiny.change(CONFIG, clip_norm=0.0).optimizer, 10)
  with jax.set_mesh(mesh):
    spread = lambda tree: jax.device_put(tree, sharding.state_shardings(mesh, tree))
    state = spread(optimizer.init(params))
    found, state = jax.jit(optimizer.update)(spread(gradients[0]), state, spread(params))
    for path, value in _flat(found).items():
      np.testing.assert_allclose(value, expected[path], rtol=1e-4, atol=2e-6, err_msg=path)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {"data": {}})
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    restored, _ = checkpoints.restore(abstract, sharding.state_shardings(mesh, abstract))
    checkpoints.close()
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))


def test_stacked_and_separate_matrices_have_the_same_update():
  """Layers and experts as one array, or each as a parameter of its own; with latent attention."""
  fields = {
    "mixer": "mla:query_rank=6:kv_rank=10",
    "num_experts": 2,
    "num_shared_experts": 0,
    "clip_norm": 0.0,
  }
  config = tiny.change(CONFIG, **fields)
  abstract = nnx.state(abstract_model(resolve_config(config), tiny.VOCAB), nnx.Param)
  optimizer, rng = make_optimizer(config.optimizer, 10), np.random.default_rng(0)
  draw = lambda: jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), abstract)

  def separate(state):
    """Each matrix, by its path and number. Other parameters whole."""
    found = {}
    for path, variable in nnx.to_flat_state(state):
      value, metadata = variable.get_value(), variable.get_metadata()
      names = tuple(name for name in metadata["logical_axes"] if name != "expert")
      if not is_hidden_matrix(variable):
        found[*path, 0] = variable
        continue
      shape = value.shape[value.ndim - len(names) :]
      for i, one in enumerate(value.reshape(-1, *shape)):
        found[*path, i] = nnx.Param(one, logical_axes=names, num_in=metadata["num_in"])
    return nnx.from_flat_state(found)

  params, gradients = draw(), [draw(), draw()]
  update = jax.jit(optimizer.update)
  states = [optimizer.init(params), optimizer.init(separate(params))]
  for g in gradients:
    stacked, states[0] = update(g, states[0], params)
    single, states[1] = update(separate(g), states[1], separate(params))
    expected = separate(stacked)
    assert len(jax.tree.leaves(single)) > len(jax.tree.leaves(stacked)) + 3 * 2 * 2
    for (path, a), (_, b) in zip(
      jax.tree.leaves_with_path(single), jax.tree.leaves_with_path(expected), strict=True
    ):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
  "fields", [{}, {"router": "noisy_topk"}, {"router": "moe_plus_plus", "scan_layers": False}]
)
def test_routers_inputs_and_outputs_are_not_hidden(fields):
  model = abstract_model(resolve_config(tiny.change(CONFIG, balancers="none", **fields)), tiny.VOCAB)
  variables = nnx.to_flat_state(nnx.state(model, nnx.Param))
  hidden = {path[-1] for path, variable in variables if is_hidden_matrix(variable)}
  assert hidden == set(HIDDEN)


def test_momentum_is_checked_before_anything_compiles():
  with pytest.raises(InputError, match=r"--optimizer=muon:1.0: optimizer muon: momentum must be in \[0, 1\)"):
    resolve_config(tiny.change(CONFIG, optimizer="muon:1.0"))
