"""FP8 experts against an emulation in NumPy: E4M3 by its definition, forward and backward formulas by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax import sharding
from moe_jax.config import MeshConfig
from moe_jax.errors import InputError
from moe_jax.nn import Context, MoE
from moe_jax.nn.experts import EXPERTS
from moe_jax.ops import grouped_matmul
from moe_jax.ops.experts import Batched, Sorted
from moe_jax.ops.fp8 import BLOCK, TILE, quantised
from moe_jax.training.compiled import check_run
from tests import tiny
from tests.nn.layer import randomized

# Every number of E4M3: a sign, 4 bits of exponent with bias 7, 3 bits of mantissa; exponent 0 is subnormal, and the
# largest pattern is no number.
POSITIVE = np.array(
  [m / 8 * 2.0**-6 for m in range(8)] + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
)[:-1]


def e4m3(x):
  """The nearest number, of two the one with an even mantissa."""
  distance = np.abs(np.abs(x)[..., None] - POSITIVE)
  nearest = np.argmin(distance + 1e-12 * (np.arange(len(POSITIVE)) % 2), axis=-1)
  return np.sign(x) * POSITIVE[nearest]


def store(x, rows, columns):
  """Block by block. The scale is float32."""
  out = np.zeros(x.shape)
  for i in range(0, x.shape[0], rows):
    for j in range(0, x.shape[1], columns):
      block = np.asarray(x[i : i + rows, j : j + columns], np.float32)
      largest = np.abs(block).max()
      scale = largest / np.float32(448) if largest else np.float32(1)
      out[i : i + rows, j : j + columns] = e4m3((block / scale).astype(float)) * float(scale)
  return out


def tile(x):
  return store(x, 1, 128)


def by_rows(x):
  return store(x, 128, 1)


def block(w):
  return store(w, 128, 128)


def test_the_definition_has_448_as_its_largest_number():
  assert len(POSITIVE) == 127 and POSITIVE[-1] == 448 and POSITIVE[1] == 2.0**-9


@pytest.mark.parametrize("blocks", [TILE, BLOCK, (3, 5)])
def test_what_is_stored_is_the_nearest_number_in_each_block(rng, blocks):
  x = rng.normal(size=(2, 131, 260)).astype(np.float32) * np.exp(rng.normal(size=(131, 1))).astype(np.float32)
  x[0, 0], x[1, 5, :7] = 0.0, 1e-30  # a block of zeros, and numbers that vanish beside others
  found = jax.jit(quantised, static_argnums=1)(x, blocks)
  expected = np.stack([store(one, *blocks) for one in x])
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  assert np.abs(found - x).max() > 1e-3


D, F, M = 140, 150, 131


@pytest.mark.parametrize("form", ["batched", "sorted"])
def test_values_and_gradients_are_those_of_the_emulation(rng, form):
  """Two experts with 131 rows each; blocks and tiles are ragged, also along rows."""
  experts = randomized(lambda: EXPERTS["fp8_products"](2, D, F, rngs=nnx.Rngs(0)))
  rows, cotangent = rng.normal(size=(2, 2, M, D)).astype(np.float32)
  rows *= np.exp(rng.normal(size=(2, M, 1))).astype(
    np.float32
  )  # so that tiles along rows differ from the others
  graphdef, params = nnx.split(experts)

  def run(params, rows):
    network = nnx.merge(graphdef, params)
    if form == "batched":
      y = network(rows, Batched())
    else:
      flat = jnp.concatenate([rows.reshape(-1, D), jnp.zeros((grouped_matmul.BLOCK, D))])
      y = network(flat, Sorted(jnp.array([M, M]), len(flat)))[: 2 * M].reshape(2, M, D)
    return jnp.vdot(y, cotangent), y

  (d_params, d_rows), y = jax.device_get(jax.jit(jax.grad(run, argnums=(0, 1), has_aux=True))(params, rows))
  inner, d_inner = params["experts"], d_params["experts"]
  for e in range(2):
    gate, up, down = (np.asarray(inner[n][...][e]) for n in ("w_gate_EDF", "w_up_EDF", "w_down_EFD"))
    x, w_gate, w_up, w_down = tile(rows[e]), block(gate), block(up), block(down)
    g, u = x @ w_gate, x @ w_up
    sigmoid = 1 / (1 + np.exp(-g))
    hidden = tile(g * sigmoid * u)
    np.testing.assert_allclose(y[e], hidden @ w_down, rtol=2e-3, atol=2e-3)
    d_y = tile(cotangent[e])
    d_hidden = d_y @ w_down.T
    d_g_full, d_u_full = d_hidden * u * sigmoid * (1 + g * (1 - sigmoid)), d_hidden * g * sigmoid
    d_g, d_u = tile(d_g_full), tile(d_u_full)
    down, up_and_gate = by_rows(hidden).T, by_rows(x).T
    expected = {"w_down_EFD": down @ by_rows(cotangent[e]), "w_gate_EDF": up_and_gate @ by_rows(d_g_full)}
    expected["w_up_EDF"] = up_and_gate @ by_rows(d_u_full)
    for name, want in expected.items():
      assert_close(d_inner[name][...][e], want)
    assert_close(d_rows[e], d_g @ w_gate.T + d_u @ w_up.T)


def assert_close(found, expected):
  """Up to the few numbers that lie between two of E4M3, which rounding in float32 may move by one step."""
  scale = np.abs(expected).max()
  np.testing.assert_allclose(found, expected, rtol=0, atol=2e-2 * scale)
  assert np.mean(np.abs(found - expected) > 1e-4 * scale) < 0.02


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dispatchers_agree_and_the_rest_of_the_layer_stays_as_it_was(rng, dtype):
  x_BLD = jnp.asarray(rng.normal(size=(2, 8, 16)), dtype)
  sizes = {"num_experts": 4, "expert_dim": 12, "capacity_factor": 4.0, "eval_capacity_factor": 4.0}

  def output(experts, dispatcher):
    layer = randomized(lambda: MoE(16, experts=experts, dispatcher=dispatcher, rngs=nnx.Rngs(0), **sizes))
    y_BLD, aux = jax.jit(lambda x: layer(x, Context(record_logits=True)))(x_BLD)
    assert y_BLD.dtype == dtype
    return np.asarray(y_BLD, np.float32), np.asarray(aux.logits_BLE)

  plain, logits = output("swiglu", "dropless")
  in_fp8 = [output("fp8_products", dispatcher) for dispatcher in ("dropless", "sorted", "einsum")]
  tolerance = 1e-4 if dtype == jnp.float32 else 3e-2
  for y_BLD, own_logits in in_fp8:
    np.testing.assert_array_equal(own_logits, logits)
    np.testing.assert_allclose(y_BLD, in_fp8[0][0], atol=tolerance * np.abs(plain).max())
  error = np.abs(in_fp8[0][0] - plain).max() / np.abs(plain).max()
  assert 3e-3 < error < 0.15  # a number of E4M3 has 4 significant bits


def test_any_network_can_be_inside():
  experts = randomized(lambda: EXPERTS["fp8_products"](2, 8, 6, experts="clipped_swiglu", rngs=nnx.Rngs(0)))
  plain = experts.experts
  rows = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 8)), jnp.float32)
  found, expected = experts(rows, Batched()), plain(rows, Batched())
  assert 0 < np.abs(found - expected).max() < 0.2 * np.abs(expected).max()


@pytest.mark.parametrize(
  ("dispatcher", "expert_dim", "sizes"),
  [
    ("dropless", 256, {"expert": 2, "tensor": 2}),
    ("all_gather", 256, {"tensor": 2}),
    ("einsum", 12, {"data": 2, "tensor": 2}),
    ("einsum", 12, {"fsdp": 2, "expert": 2}),
  ],
  ids=str,
)
def test_what_no_device_cuts_is_the_same_on_every_mesh(rng, dispatcher, expert_dim, sizes):
  """Devices that hold experts get all rows of these, and `einsum` has the tiles of all devices together."""
  x_BLD, d_y = jnp.asarray(rng.normal(size=(2, 4, 40, 16)), jnp.float32)
  widths = {"num_experts": 2, "num_experts_per_token": 1, "expert_dim": expert_dim, "capacity_factor": 2.0}
  layer = randomized(
    lambda: MoE(16, experts="fp8_products", dispatcher=dispatcher, rngs=nnx.Rngs(0), **widths)
  )
  graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

  def loss(params, x_BLD):
    return jnp.vdot(nnx.merge(graphdef, params, rest)(x_BLD, Context(train=True))[0], d_y)

  def gradients(**sizes):
    mesh = sharding.make_mesh(MeshConfig(**{"data": 1} | sizes))
    with jax.set_mesh(mesh):
      args = jax.device_put(
        (params, x_BLD), (sharding.state_shardings(mesh, params), sharding.batch_sharding(mesh))
      )
      return jax.device_get(jax.jit(jax.grad(loss, argnums=(0, 1)))(*args))

  for found, expected in zip(*map(jax.tree.leaves, (gradients(**sizes), gradients())), strict=True):
    assert_close(found, expected)


@pytest.mark.parametrize("experts", ["fp8_products", "expert_dropout:experts=fp8_products"])
def test_a_mesh_that_would_cut_tiles_of_hidden_units_is_refused_before_anything_is_compiled(experts):
  config = tiny.change(tiny.CONFIG, experts=experts, dispatcher="dropless", mesh=MeshConfig(data=1, tensor=2))
  mesh = sharding.make_mesh(config.mesh)
  with pytest.raises(
    InputError, match=r"2 devices .* cut a tile of 128 of the 16 hidden units .* multiple of 256"
  ):
    check_run(config, mesh)
  check_run(tiny.change(config, expert_dim=256), mesh)
  check_run(tiny.change(config, dispatcher="sorted"), mesh)
  check_run(tiny.change(config, mesh=tiny.ONE_DEVICE), sharding.make_mesh(tiny.ONE_DEVICE))
