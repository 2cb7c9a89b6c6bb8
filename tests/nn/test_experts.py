"""Experts are any tree: each kind against a loop over tokens, under every dispatcher, on one device and on eight."""

import functools

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
from moe_jax.ops.experts import Batched, WithRowBits
from moe_jax.sharding.dispatchers import DISPATCHERS
from tests import tiny
from tests.nn.layer import initialised, randomized
from tests.reference.routing import pick, softmax

B, L, D, E, K, F = 8, 4, 8, 4, 2, 6
CLIPPED = "clipped_swiglu:limit=0.5"  # low, so that it clips
KINDS = {
  "gelu": "gelu",
  "clipped": CLIPPED,
  "bounded": "bounded_swiglu:limit=0.5",
  "dropout": functools.partial(EXPERTS["expert_dropout"], rate=0.4, experts=CLIPPED),
  "low_rank": functools.partial(EXPERTS["low_rank"], rank=2, alpha=3.0, experts=CLIPPED),
}
MESHES = {"expert=4,tensor=2": {"expert": 4, "tensor": 2}, "fsdp=2": {"data": 2, "fsdp": 2, "expert": 2}}
# On devices, experts differ by their matrices, biases and factors. Those of `clipped` are within dropout and adapters, and
# those of `bounded` are a SwiGLU's: tests/sharding/test_parallel_equality.py.
ON_DEVICES = ("gelu", "dropout", "low_rank")
KEYS, STEP_KEY = jax.random.split(jax.random.key(7), B), jax.random.key(8)
X_BLD, COTANGENT_BLD = np.random.default_rng(1).normal(size=(2, B, L, D)).astype(np.float32)


def make(kind, dispatcher):
  """Random weights, also of biases and of both factors of an adapter. Nothing drops for want of capacity."""
  return randomized(
    lambda: MoE(
      D,
      num_experts=E,
      num_experts_per_token=K,
      expert_dim=F,
      experts=KINDS[kind],
      dispatcher=dispatcher,
      capacity_factor=float(E),
      rngs=nnx.Rngs(0),
    ),
    seed=list(KINDS).index(kind),
  )


@functools.cache
def run(dispatcher, mesh):
  """Output and gradients of each kind, in one program; those of parameters by their path, and of x."""
  kinds = ON_DEVICES if mesh in MESHES else tuple(KINDS)
  layers = nnx.Dict({kind: make(kind, dispatcher) for kind in kinds})
  graphdef, params, rest = nnx.split(layers, nnx.Param, ...)

  def loss(params, x_BLD, cotangent_BLD, keys_B):
    context = Context(key_B=keys_B, step_key=STEP_KEY, train=True)
    layers = nnx.merge(graphdef, params, rest)
    ys = {kind: layers[kind](x_BLD[kind], context)[0] for kind in kinds}
    return sum(jnp.vdot(y, cotangent_BLD) for y in ys.values()), ys

  on_mesh = sharding.make_mesh(MeshConfig(**{"data": 1} | MESHES.get(mesh, {})))
  by_sequence, everywhere = sharding.batch_sharding(on_mesh), sharding.replicated(on_mesh)
  layouts = (sharding.state_shardings(on_mesh, params), by_sequence, by_sequence, by_sequence)
  with jax.set_mesh(on_mesh):
    step = jax.jit(
      jax.grad(loss, argnums=(0, 1), has_aux=True), in_shardings=layouts, out_shardings=everywhere
    )
    (d_params, d_x), ys = jax.device_get(step(params, dict.fromkeys(kinds, X_BLD), COTANGENT_BLD, KEYS))
  found = {kind: {"y": ys[kind], "x": d_x[kind]} for kind in kinds}
  for (kind, *path), d in nnx.to_flat_state(d_params):
    found[kind]["/".join(path)] = d.get_value()
  return found


# --- the loop ---


def kept_units():
  """[B, L, E, F] bool: a hash of what the token's key, the step's key, expert and unit give."""
  bits = lambda key: jax.random.bits(jax.random.fold_in(key, np.uint32(2**32 - 1)), (L,), jnp.uint32)
  token_BL = np.stack([np.asarray(bits(key)) for key in KEYS]).astype(np.uint64)
  unit_EF = np.asarray(jax.random.bits(STEP_KEY, (E, F), jnp.uint32)).astype(np.uint64)
  h = token_BL[:, :, None, None] ^ unit_EF
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
    h = ((h ^ (h >> shift)) * factor) % 2**32
  return h >= round(0.4 * 2**32)


def expert(kind, w, e, x, kept_F):
  if kind == "gelu":
    z = x @ w["experts/w_up_EDF"][e]
    return (0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))) @ w["experts/w_down_EFD"][e]
  if kind == "bounded":
    gate = np.minimum(x @ w["experts/w_gate_EDF"][e], 0.5)
    up = np.clip(x @ w["experts/w_up_EDF"][e], -0.5, 0.5)
    return (gate / (1 + np.exp(-gate)) * up) @ w["experts/w_down_EFD"][e]
  inner = "experts/" if kind == "clipped" else "experts/experts/"
  names = ("w_gate_EDF", "w_up_EDF", "w_down_EFD", "b_gate_EF", "b_up_EF", "b_down_ED")
  own = {name: w[inner + name][e] for name in names}
  if kind == "low_rank":
    for name in names[:3]:
      own[name] = (
        own[name] + 1.5 * w[f"experts/adapters/down/{name}"][e] @ w[f"experts/adapters/up/{name}"][e]
      )
  gate = np.minimum(x @ own["w_gate_EDF"] + own["b_gate_EF"], 0.5)
  up = np.clip(x @ own["w_up_EDF"] + own["b_up_EF"], -0.5, 0.5)
  hidden = (up + 1) * gate / (1 + np.exp(-1.702 * gate))
  if kind == "dropout":
    hidden = np.where(kept_F, hidden / 0.6, 0)
  return hidden @ own["w_down_EFD"] + own["b_down_ED"]


def loop(kind, w, kept_BLEF):
  y_BLD = np.zeros((B, L, D))
  for b, t in np.ndindex(B, L):
    x = w["x"][b, t]
    probs = softmax(x @ w["router/w_router_DE"])
    chosen = pick(probs, [0.0] * E, K)
    for e in chosen:
      y_BLD[b, t] += probs[e] / sum(probs[i] for i in chosen) * expert(kind, w, e, x, kept_BLEF[b, t, e])
  return y_BLD


@functools.cache
def expected(kind):
  """The loop's output, and for x and each parameter a direction and the derivative along it."""
  flat = nnx.to_flat_state(nnx.state(make(kind, "sorted"), nnx.Param))
  w = {"/".join(path): np.asarray(v.get_value(), np.float64) for path, v in flat} | {"x": X_BLD.astype(float)}
  rng, kept_BLEF, eps, along = np.random.default_rng(5), kept_units(), 1e-6, {}
  for name, value in w.items():
    direction = rng.normal(size=value.shape)
    sides = [loop(kind, w | {name: value + s * eps * direction}, kept_BLEF) for s in (1, -1)]
    along[name] = direction, np.sum((sides[0] - sides[1]) * COTANGENT_BLD) / (2 * eps)
  return loop(kind, w, kept_BLEF), along


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_values_and_gradients_equal_the_loop(dispatcher):
  for kind, found in run(dispatcher, "one device").items():
    y_BLD, along = expected(kind)
    np.testing.assert_allclose(found["y"], y_BLD, rtol=1e-4, atol=1e-5, err_msg=kind)
    assert along.keys() == found.keys() - {"y"}
    for name, (direction, want) in along.items():
      if kind == "low_rank" and name.startswith("experts/experts/"):
        assert not np.any(found[name]), name  # frozen
        continue
      got = np.sum(found[name] * direction)
      np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4, err_msg=f"{kind} {name}")
      assert abs(want) > 1e-3, (kind, name)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_eight_devices_give_the_same(dispatcher, mesh):
  """Also where an output has parts on several devices, to which a bias adds once, and a unit drops on the one it is on."""
  for kind, found in run(dispatcher, mesh).items():
    for name, want in run("sorted", "one device")[kind].items():
      np.testing.assert_allclose(found[name], want, rtol=1e-4, atol=1e-5, err_msg=f"{kind} {name}")


# --- expert dropout ---


def test_which_units_drop():
  """Every hidden unit is 1 and is seen in the output. All rows are equal, so what they hold says nothing."""
  size, length = 16, 256
  experts = functools.partial(EXPERTS["expert_dropout"], rate=0.4, experts="relu")
  sizes = {"num_experts": 2, "num_experts_per_token": 1, "expert_dim": size}
  moe = MoE(size, experts=experts, dispatcher="dropless", rngs=nnx.Rngs(0), **sizes)
  moe.experts.experts.w_up_EDF.set_value(jnp.full((2, size, size), 1 / size))
  moe.experts.experts.w_down_EFD.set_value(jnp.tile(jnp.eye(size), (2, 1, 1)))
  given = Context(key_B=KEYS, step_key=STEP_KEY, train=True)

  @jax.jit
  def outputs(other_key):
    contexts = {
      "drawn": given,
      "again": given._replace(step_key=other_key),
      "no step key": given._replace(step_key=None),
      "no sequence keys": given._replace(key_B=None),
      "evaluation": given._replace(train=False),
    }
    layer = lambda dtype, c: moe(jnp.ones((B, length, size), dtype), c._replace(mask_BL=None))[0]
    ys = {name: layer(jnp.float32, context) for name, context in contexts.items()}
    return ys | {"bfloat16": layer(jnp.bfloat16, given)}

  ys = {name: np.asarray(y, np.float32) for name, y in outputs(jax.random.key(9)).items()}
  for name in ("no step key", "no sequence keys", "evaluation"):
    np.testing.assert_allclose(ys[name], 1, rtol=1e-6, err_msg=name)
  kept = ys["drawn"] > 0
  np.testing.assert_allclose(ys["drawn"][kept], 1 / 0.6, rtol=1e-6)  # so the expectation stays
  np.testing.assert_array_equal(ys["bfloat16"] > 0, kept)

  def within(found, share, count):
    assert np.abs(found - share).max() < 5 * np.sqrt(share * (1 - share) / count), found

  within(kept.mean(), 0.6, kept.size)
  within(kept.mean(axis=(0, 1)), 0.6, B * length)  # of each unit
  within(kept.mean(axis=(1, 2)), 0.6, length * size)  # of each sequence
  agree = 0.6**2 + 0.4**2  # of independent draws
  within((kept == (ys["again"] > 0)).mean(), agree, kept.size)  # another step
  within((kept[:-1] == kept[1:]).mean(), agree, kept[1:].size)  # another sequence
  within((kept[:, :-1] == kept[:, 1:]).mean(), agree, kept[:, 1:].size)  # another token
  within((kept[..., :-1] == kept[..., 1:]).mean(), agree, kept[..., 1:].size)  # another unit


def test_units_drop_in_a_training_step():
  """With nearly all of them gone, no gradient reaches the experts of a model, and all else has one."""
  experts = functools.partial(EXPERTS["expert_dropout"], rate=1 - 1e-7, experts="relu")
  result = tiny.one_step(tiny.change(tiny.CONFIG, num_layers=1, experts=experts), tiny.make_batch())
  for path, gradient in nnx.to_flat_state(result["gradients"]):
    assert np.any(gradient.get_value()) == ("experts" not in path), path


class Silenced(EXPERTS["relu"]):
  """Draws that it adds nothing."""

  def for_step(self, key):
    drawn = nnx.clone(self)
    drawn.draws = key is not None
    return drawn if drawn.draws else self

  def __call__(self, rows, product):
    return super().__call__(rows, product) * (0 if self.draws else 1)


@pytest.mark.parametrize(
  "wrapper", ["expert_dropout", "low_rank", "fp8_products", "quantised", "quantised_training"]
)
def test_networks_around_another_one_draw_what_it_draws(wrapper):
  network = initialised(lambda: EXPERTS[wrapper](E, D, F, experts=Silenced, rngs=nnx.Rngs(0)))
  drawn, rows = network.for_step(STEP_KEY), WithRowBits(Batched(), jnp.zeros((E, 1), jnp.uint32))
  assert (network.draws, drawn.draws, network.for_step(None).draws) == (False, True, False)
  assert np.any(network(X_BLD[:E, :1], rows)) and not np.any(drawn(X_BLD[:E, :1], rows))


def test_units_drop_inside_fp8_products_as_outside():
  inside, outside = (
    randomized(lambda s=spec: EXPERTS.resolve(s)(num_experts=E, dim=D, expert_dim=F, rngs=nnx.Rngs(0)))
    for spec in (
      "fp8_products:experts=expert_dropout;rate=0.4",
      "expert_dropout:rate=0.4:experts=fp8_products",
    )
  )
  product = WithRowBits(Batched(), jax.random.bits(KEYS[0], (E, L), jnp.uint32))
  found, expected = (network.for_step(STEP_KEY)(X_BLD[:E], product) for network in (inside, outside))
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
  assert np.abs(found - inside(X_BLD[:E], product)).max() > 0.1


# --- low-rank adapters ---


def test_adapters_start_as_the_experts_they_adapt():
  sizes = {"num_experts": E, "expert_dim": F}
  adapted = initialised(lambda: MoE(D, experts=KINDS["low_rank"], rngs=nnx.Rngs(0), **sizes))
  plain = initialised(lambda: MoE(D, experts=KINDS["clipped"], rngs=nnx.Rngs(1), **sizes))
  plain.experts, plain.router = adapted.experts.experts, adapted.router
  assert np.any(adapted.experts.adapters.down["w_up_EDF"].get_value())
  output = jax.jit(lambda layer: layer(X_BLD)[0])
  np.testing.assert_array_equal(output(adapted), output(plain))


def test_three_steps_move_the_adapters_and_not_what_is_frozen():
  """With weight decay and clipping, neither of which touches or counts frozen experts."""
  config = tiny.change(
    tiny.CONFIG, num_layers=1, experts=KINDS["low_rank"], weight_decay=0.1, clip_norm=0.5, learning_rate=0.01
  )
  mesh, steps = tiny._steps(config)
  with jax.set_mesh(mesh):
    state = steps.init(0)
    before = dict(nnx.to_flat_state(jax.device_get(state.params)))
    for _ in range(3):
      state, metrics = steps.train(state, tiny.make_batch())
  after = dict(nnx.to_flat_state(jax.device_get(state.params)))
  frozen = {path for path in before if path[-3:-1] == ("experts", "experts")}
  assert len(frozen) == 6
  for path, variable in before.items():
    moved = np.abs(after[path].get_value() - variable.get_value()).max()
    assert (moved == 0) if path in frozen else (moved > 0), path
  norms = [
    np.sum(d.get_value() ** 2.0) for p, d in nnx.to_flat_state(metrics["gradients"]) if p not in frozen
  ]
  np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(sum(norms)), rtol=1e-5)


@pytest.mark.parametrize("wrapper", ["low_rank", "quantised", "quantised_training"])
@pytest.mark.parametrize("inner", ["expert_dropout", "fp8_products"])
def test_what_changes_matrices_goes_inside(wrapper, inner):
  with pytest.raises(InputError, match=f"has no matrices of its own.* expert_dropout:experts={wrapper}"):
    EXPERTS.resolve(f"{wrapper}:experts={inner}")(num_experts=2, dim=4, expert_dim=4, rngs=nnx.Rngs(0))


# --- bounded ---


def test_bounds_that_nothing_reaches_change_nothing():
  sizes = {"num_experts": E, "expert_dim": F}
  layer = lambda experts: jax.jit(lambda: MoE(D, experts=experts, rngs=nnx.Rngs(0), **sizes)(X_BLD)[0])()
  np.testing.assert_array_equal(layer("bounded_swiglu:limit=1000"), layer("swiglu"))
  with pytest.raises(InputError, match="limit must be above 0"):
    layer("bounded_swiglu:limit=0")
