"""Rounding to the nearest value of a format, stable, under every dispatcher, and of nothing but experts."""

import dataclasses
import functools
import itertools

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from moe_jax import sharding
from moe_jax.adapt import (
  calibrate,
  change_moe,
  dequantise,
  expert_bytes,
  expert_inputs,
  quantise,
  wrap_experts,
)
from moe_jax.adapt.quantise import scaled_rounding
from moe_jax.config import MeshConfig
from moe_jax.errors import InputError
from moe_jax.nn import MoE
from moe_jax.nn.variables import abstract
from moe_jax.ops import quantisation as q
from moe_jax.sharding.dispatchers import DISPATCHERS
from moe_jax.training.load import load_run
from moe_jax.training.start import save_model
from tests import tiny
from tests.adapt import models
from tests.adapt.models import hashes, logits
from tests.nn.layer import initialised

FP8 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
VALUES = {  # all values of a code, and the block that shares a scale
  ("int8", 0): (np.arange(-127, 128.0), (None, 1)),
  ("int8", 5): (np.arange(-127, 128.0), (5, 1)),
  ("int4", 0): (np.arange(-7, 8.0), (None, 1)),
  ("int4", 4): (np.arange(-7, 8.0), (4, 1)),
  ("fp8", 0): (FP8[np.isfinite(FP8)], (128, 128)),
  ("mxfp4", 0): (np.concatenate([FP4, -FP4]), (32, 1)),
}
RANDOM = np.random.default_rng(0).normal(size=(2, 37, 130)).astype(np.float32)
RANDOM *= np.exp(np.random.default_rng(1).normal(size=(2, 1, 130)) * 3).astype(np.float32)  # of many sizes
RANDOM[0, :, 3] = 0


# each is one program, as in an adaptation
quantised = jax.jit(q.quantise, static_argnames="format")
dequantised = jax.jit(q.dequantise, static_argnames=("format", "num_rows"))


def rounded(w, name, group):
  fmt = q.format_of(name, group)
  return np.asarray(dequantised(*quantised(w, fmt), fmt, w.shape[1]))


@pytest.mark.parametrize(("name", "group"), VALUES)
def test_every_number_becomes_the_nearest_value_of_its_block(name, group):
  values, (rows, columns) = VALUES[name, group]
  found = rounded(RANDOM, name, group)
  for e, x, y in itertools.product(range(2), range(0, 37, rows or 37), range(0, 130, columns)):
    block = np.s_[e, x : x + (rows or 37), y : y + columns]
    w, got = RANDOM[block].astype(np.float64), found[block].astype(np.float64)
    amax = np.abs(w).max()
    scale = amax / np.abs(values).max() if amax else 1.0
    if name == "mxfp4":
      scale = 2.0 ** np.ceil(np.log2(scale))
    nearest = np.abs(w[..., None] - scale * values).min(axis=-1)
    # half a step is the largest distance from the nearest value; scales are float32
    np.testing.assert_allclose(np.abs(got - w), nearest, rtol=1e-3, atol=2e-6 * amax)


@pytest.mark.parametrize(("name", "group"), VALUES)
def test_what_is_rounded_stays(name, group):
  once = rounded(RANDOM, name, group)
  np.testing.assert_allclose(rounded(once, name, group), once, rtol=1e-6)


@pytest.mark.parametrize(
  ("name", "group", "bits"), [("int8", 0, 8), ("int4", 0, 4), ("int4", 8, 4), ("fp8", 0, 8), ("mxfp4", 0, 4)]
)
def test_a_quantised_model_computes_with_rounded_matrices_and_changes_nothing_else(name, group, bits):
  model = models.model()
  small = quantise(model, name, group)
  back = dequantise(small)
  np.testing.assert_allclose(logits(small), logits(back), rtol=1e-5, atol=1e-5)
  before, after = hashes(model), hashes(back)
  assert {path for path in before if before[path] != after[path]} == {
    path for path in before if ".experts." in path
  }
  assert back.config == model.config
  codes = expert_bytes(model) * bits // 32
  scales = 2 * sum(
    np.prod(quantised(np.zeros((8, 16, 16)), q.format_of(name, group))[1].shape) for _ in range(3)
  )
  assert expert_bytes(small) == codes + scales * (1 if name == "mxfp4" else 4)
  assert expert_bytes(quantise(back, name, group)) == expert_bytes(small)


def test_int8_changes_less_than_int4():
  model = models.model()
  error = lambda *format: np.abs(logits(quantise(model, *format)) - logits(model)).max()
  assert 0 < error("int8") < error("int4", 8)


X_BLD = np.random.default_rng(0).normal(size=(8, 4, 8)).astype(np.float32)
SIZES = {"num_experts": 4, "expert_dim": 16, "capacity_factor": 4.0, "eval_capacity_factor": 4.0}


@jax.jit
def layer_output(layer):
  return layer(X_BLD)[0]


@functools.cache
def state_of(experts):
  return nnx.state(initialised(lambda: MoE(8, experts=experts, rngs=nnx.Rngs(0), **SIZES)))


def layer_of(experts, **fields):
  """The same values under every dispatcher, drawn once."""
  layer = abstract(lambda: MoE(8, experts=experts, rngs=nnx.Rngs(0), **SIZES | fields))
  return nnx.merge(nnx.graphdef(layer), state_of(experts))


def rounded_layer(layer):
  """A layer of SwiGLU experts with the matrices that a quantised one stands for."""
  plain = layer_of("swiglu")
  plain.router = layer.router
  for weight, rows in (("w_gate_EDF", 8), ("w_up_EDF", 8), ("w_down_EFD", 16)):
    own = layer.experts.codes[weight][...], layer.experts.scales[weight][...]
    getattr(plain.experts, weight).set_value(dequantised(*own, layer.experts.format, rows))
  return plain


FORMATS = ("int8", "int4:group=6", "mxfp4")  # a scale for all rows, for rows that no mesh cuts evenly, for 32
MESHES = {"1": {}, "8": {"fsdp": 2, "expert": 2, "tensor": 2}}


@functools.cache
def stored_and_trained(dispatcher, mesh):
  """For each format the output of both networks, and the gradients of the trained one, in one program."""
  specs = [f"{name}:format={format}" for name in ("quantised", "quantised_training") for format in FORMATS]
  layers = nnx.List([layer_of(spec, dispatcher=dispatcher) for spec in specs])
  graphdef, params, rest = nnx.split(layers, nnx.Param, ...)

  def loss(params, rest):
    ys = {spec: layer(X_BLD)[0] for spec, layer in zip(specs, nnx.merge(graphdef, params, rest))}
    return sum((y**2).sum() for y in ys.values()), ys

  on_mesh = sharding.make_mesh(MeshConfig(**{"data": 1} | MESHES[mesh]))
  with jax.set_mesh(on_mesh):
    args = [jax.device_put(state, sharding.state_shardings(on_mesh, state)) for state in (params, rest)]
    gradients, ys = jax.device_get(jax.jit(jax.grad(loss, has_aux=True))(*args))
  return ys, dict(nnx.to_flat_state(gradients))


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_every_dispatcher_on_every_mesh_multiplies_by_the_same_matrices(dispatcher, mesh):
  """Also where a device has a part of the rows that share a scale or a byte."""
  ys, gradients = stored_and_trained(dispatcher, mesh)
  for format in FORMATS:
    stored, trained = (f"{name}:format={format}" for name in ("quantised", "quantised_training"))
    want = layer_output(rounded_layer(layer_of(stored)))
    np.testing.assert_allclose(ys[stored], want, rtol=1e-4, atol=1e-5, err_msg=stored)
    want = stored_and_trained("sorted", "1")[0][trained]
    np.testing.assert_allclose(ys[trained], want, rtol=1e-4, atol=1e-5, err_msg=trained)
  for path, want in stored_and_trained("sorted", "1")[1].items():
    got, want = gradients[path].get_value(), want.get_value()
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max(), err_msg=str(path))


@pytest.mark.parametrize("experts", ["quantised", "quantised_training"])
def test_a_step_is_the_same_on_every_mesh_and_in_every_cut(experts):
  fields = {
    "experts": f"{experts}:format=int4:group=8",
    "dispatcher": "dropless",
    "balancers": "none",
    "jitter": 0.0,
    "num_layers": 1,
    "num_heads": 4,
    "num_kv_heads": 4,
  }
  step = lambda **more: tiny.one_step(tiny.change(tiny.CONFIG, **fields, **more), tiny.make_batch())
  tiny.assert_same(step(mesh=MeshConfig(data=1, fsdp=2, tensor=4), accumulation=2), step())


def test_trained_through_the_rounding():
  """The forward pass is the rounded one; the gradient is that of the rounded matrices."""
  trained = layer_of("quantised_training:format=int4")
  plain = rounded_layer(layer_of("quantised:format=int4"))
  gradient = jax.jit(nnx.grad(lambda layer: (layer(X_BLD)[0] ** 2).sum()))
  np.testing.assert_allclose(layer_output(trained), layer_output(plain), rtol=1e-4, atol=1e-5)
  of_trained, of_plain = gradient(trained).experts.experts, gradient(plain).experts
  for weight in ("w_gate_EDF", "w_up_EDF", "w_down_EFD"):
    want = of_plain[weight].get_value()
    np.testing.assert_allclose(
      of_trained[weight].get_value(), want, rtol=1e-3, atol=1e-4 * np.abs(want).max()
    )


def test_a_model_that_was_trained_through_the_rounding_is_quantised_without_a_change():
  trained = wrap_experts(models.model(), "quantised_training:format=int4")
  np.testing.assert_allclose(logits(quantise(trained, "int4")), logits(trained), rtol=1e-4, atol=1e-5)


def test_a_quantised_model_takes_other_balancers():
  small = quantise(models.model(), "int8")
  np.testing.assert_array_equal(logits(change_moe(small, balancers="switch_loss:0.1")), logits(small))


@pytest.mark.parametrize(
  ("call", "match"),
  [
    (lambda m: quantise(m, "int3"), "unknown format 'int3': did you mean int8 or int4"),
    (lambda m: quantise(m, "fp8", 64), "format fp8: has blocks of 128 rows, got group=64"),
    (lambda m: quantise(quantise(m)), "quantised already"),
    (lambda m: dequantise(m), "are not quantised"),
    (lambda m: quantise(wrap_experts(m, "expert_dropout")), "has no matrices of its own"),
    (lambda m: quantise(models.model(models.DENSE)), "no layer with routed experts"),
  ],
)
def test_what_is_wrong_is_said_in_one_line(call, match):
  with pytest.raises(InputError, match=match):
    call(models.model())


def test_odd_widths():
  config = dataclasses.replace(
    models.CONFIG, moe=dataclasses.replace(models.SPARSE, expert_dim=5), num_layers=1
  )
  model = models.model(config)
  np.testing.assert_allclose(
    logits(quantise(model, "int4")), logits(dequantise(quantise(model, "int4"))), rtol=1e-5, atol=1e-5
  )


@pytest.mark.parametrize(("name", "group"), VALUES)
def test_scales_that_follow_the_inputs_round_the_output_better_or_as_before(name, group):
  rng, fmt = np.random.default_rng(2), q.format_of(name, group)
  w = RANDOM[:, :, :20]
  x = rng.normal(size=(2, 50, 37)).astype(np.float32)
  x[0] *= np.exp(rng.normal(size=37) * 2)  # of the first expert, inputs are of many sizes
  x[1] = np.sign(x[1])  # and of the second, of one
  codes, scales, factors = scaled_rounding(w, x, fmt)
  error = lambda rounded: np.square(np.einsum("enx,exy->eny", x, (rounded - w).astype(np.float64))).sum(
    axis=(1, 2)
  )
  plain = rounded(w, name, group)
  aware = np.asarray(dequantised(codes, scales, fmt, 37)) / factors[..., None]
  assert (error(aware) <= error(plain) * (1 + 1e-5)).all()
  np.testing.assert_array_equal(factors[1], 1.0)  # equal inputs: rounding alone
  np.testing.assert_array_equal(codes[1], np.asarray(quantised(w, fmt)[0])[1])
  if not group and name.startswith("int"):
    assert error(aware)[0] < 0.9 * error(plain)[0]


def test_inputs_are_those_of_the_tokens_of_an_expert_and_rare_experts_get_others():
  model, batch = models.model(), tiny.make_batch()
  found = expert_inputs(model, [batch, tiny.make_batch(seed=1)], per_expert=40)
  counts = calibrate(model, [batch, tiny.make_batch(seed=1)])
  assert list(found) == [0, 1]
  block = model.segments[0].pattern.blocks[0]
  for layer, inputs in found.items():
    np.testing.assert_array_equal(inputs["w_gate_EDF"], inputs["w_up_EDF"])
    x = inputs["w_up_EDF"].astype(np.float64)
    gate, up = (
      np.einsum("end,edf->enf", x, np.asarray(getattr(block.ffn.experts, w)[layer]))
      for w in ("w_gate_EDF", "w_up_EDF")
    )
    np.testing.assert_allclose(inputs["w_down_EFD"], gate / (1 + np.exp(-gate)) * up, rtol=1e-4, atol=1e-6)
    logits = x @ np.asarray(block.ffn.router.w_router_DE[layer], np.float64)
    chosen = np.argsort(-logits, axis=-1)[..., :2]
    is_own = (chosen == np.arange(8)[:, None, None]).any(axis=-1)  # [E, n]
    np.testing.assert_array_equal(is_own.sum(axis=1), np.minimum(counts[layer].tokens_E, 40))
    assert (np.diff(is_own.astype(int), axis=1) <= 0).all()  # own tokens come first
    assert min(counts[layer].tokens_E) < 40


def test_a_model_with_factors_computes_with_the_rounded_matrices(tmp_path):
  model = models.model()
  small = quantise(model, "int4", inputs=expert_inputs(model, [tiny.make_batch()], per_expert=32))
  back = dequantise(small)
  np.testing.assert_allclose(logits(small), logits(back), rtol=1e-5, atol=1e-5)
  assert back.config == model.config and hashes(back) != hashes(dequantise(quantise(model, "int4")))
  factors = 2 * 8 * (16 + 16 + 16) * 4
  assert expert_bytes(small) == expert_bytes(quantise(model, "int4")) + factors
  save_model(tmp_path / "small", small, tiny.CONFIG)
  assert hashes(load_run(tmp_path / "small").model) == hashes(small)
  with pytest.raises(InputError, match="the experts have no matrices of their own"):
    expert_inputs(small, [tiny.make_batch()], per_expert=8)
  with pytest.raises(InputError, match=r"calibration text: has .* tokens, at least 10000 are needed"):
    expert_inputs(model, [tiny.make_batch()], per_expert=10_000)
