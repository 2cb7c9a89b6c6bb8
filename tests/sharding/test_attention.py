"""The kernel of a backend: which forms it is asked for, that it computes the same, on one device and on a mesh."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import sharding
from moe_jax.config import MeshConfig
from moe_jax.ops import attention_kernels
from moe_jax.ops.attention import attend as by_xla
from moe_jax.sharding import rules
from moe_jax.sharding.attention import attend

B, L, N, N_KV, H = 2, 128, 4, 2, 8
PAD_B = jnp.array([0, 37], jnp.int32)
MASK_BL = jnp.arange(L)[None] < jnp.array([[L], [90]])
SINK_N = jnp.array([3.0, -1.0, 0.5, 1.0])
FORMS = {
  "causal": {},
  "scaled, in a window": {"window": 5, "scale": 0.7},
  "padding on the left": {"pad_B": PAD_B, "window": 50},
  "bidirectional window": {"causal": False, "mask_BL": MASK_BL, "window": 5},
  "packed": {
    "segment_BL": jnp.cumsum(jnp.arange(L)[None] % jnp.array([[50], [33]]) == 0, axis=1, dtype=jnp.int32)
  },
  "sinks": {"sink_N": SINK_N, "window": 20},
}


@pytest.fixture
def arrays(rng):
  return tuple(
    jnp.asarray(rng.normal(size=(B, L, heads, width)), jnp.float32)
    for heads, width in ((N, H), (N_KV, H), (N_KV, 5))
  )


def seen(form):
  """Which rows are read: what comes out at padding may be anything."""
  text_BL = (
    jnp.arange(L)[None] >= PAD_B[:, None] if "pad_B" in form else form.get("mask_BL", jnp.ones((B, L), bool))
  )
  return text_BL[:, :, None, None]


def both(run, arrays, form):
  """Values where they are read, and the gradients of the arrays and of the sinks."""
  cotangent = jnp.sin(jnp.arange(B * L * N * arrays[2].shape[-1])).reshape(B, L, N, -1)
  form, sinks = dict(form), form.get("sink_N")

  def loss(arrays, sinks):
    given = form if sinks is None else form | {"sink_N": sinks}
    out = run(*arrays, **given) * seen(form)
    return jnp.vdot(out.astype(jnp.float32), cotangent), out

  gradients, out = jax.jit(jax.grad(loss, 0 if sinks is None else (0, 1), has_aux=True))(arrays, sinks)
  return jax.tree.map(lambda x: np.asarray(x, np.float32), (out, gradients))


def assert_close(found, expected, bound):
  for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert np.abs(one - other).max() <= bound * np.abs(other).max()


@pytest.mark.parametrize("form", FORMS)
def test_the_kernel_of_a_tpu_computes_the_same(arrays, form):
  """In Pallas' interpreter, in float32: no rounding hides an error. tests/ops/test_attention.py has the definition."""
  run = functools.partial(attention_kernels.splash, interpret=True)
  assert_close(both(run, arrays, FORMS[form]), both(by_xla, arrays, FORMS[form]), 2e-5)


@pytest.fixture
def gpu(monkeypatch):
  """A GPU of compute capability 9, for which XLA stands in. Returns the options of each call of the kernel."""
  asked, plain = [], jax.nn.dot_product_attention

  def stand_in(*args, implementation=None, **options):
    if implementation == "cudnn":
      asked.append(options)
    return plain(*args, **options)

  monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
  monkeypatch.setattr(rules, "platform", lambda: "gpu")
  monkeypatch.setattr(attention_kernels, "cuda_capability", lambda: 9.0)
  return asked


@pytest.mark.parametrize("form", FORMS)
def test_the_kernel_of_a_gpu_is_asked_for_the_same(arrays, gpu, form):
  """In a half type, where cuDNN has the form. With "blocks" and in float32, it is not asked."""
  given, half = FORMS[form], tuple(x.astype(jnp.bfloat16) for x in arrays)
  expected = both(by_xla, half, given)
  assert not gpu
  jax.eval_shape(functools.partial(attend, **given), *arrays)
  jax.eval_shape(functools.partial(attend, kernel="blocks", **given), *half)
  assert not gpu
  found = both(attend, half, given)
  has_form = form not in ("packed", "sinks") and given.get("causal", True)
  assert len(gpu) == has_form
  assert_close(found, expected, 0.02)  # 8 bits
  if has_form:
    window = given.get("window")
    assert gpu[0]["local_window_size"] == (window and (window - 1, 0))


@pytest.mark.parametrize(
  ("platform", "capability", "dtype", "length", "width", "value_width", "name"),
  [
    ("cpu", 0, "bfloat16", 128, 64, 64, ""),
    ("gpu", 9.0, "bfloat16", 128, 64, 64, "cudnn"),
    ("gpu", 9.0, "float16", 130, 192, 128, "cudnn"),
    ("gpu", 9.0, "float32", 128, 64, 64, ""),
    ("gpu", 9.0, "bfloat16", 64, 64, 64, ""),  # short
    ("gpu", 9.0, "bfloat16", 128, 264, 264, ""),  # wide
    ("gpu", 8.6, "bfloat16", 128, 192, 128, ""),
    ("gpu", 8.6, "bfloat16", 128, 128, 128, "cudnn"),
    ("gpu", 7.5, "bfloat16", 128, 64, 64, ""),  # older than the kernel
    ("gpu", 0, "bfloat16", 128, 64, 64, ""),  # not NVIDIA's
    ("gpu", 9.0, "bfloat16", 128, 60, 60, ""),
    ("tpu", 0, "bfloat16", 384, 192, 128, "splash"),
    ("tpu", 0, "float32", 384, 64, 64, ""),
    ("tpu", 0, "bfloat16", 200, 64, 64, ""),  # no whole tiles
  ],
)
def test_the_kernel_that_a_backend_has(
  monkeypatch, platform, capability, dtype, length, width, value_width, name
):
  monkeypatch.setattr(attention_kernels, "cuda_capability", lambda: capability)
  query, key, value = (jax.ShapeDtypeStruct((1, length, 2, n), dtype) for n in (width, width, value_width))
  assert attention_kernels.kernel_for(platform, query, key, value) == name


@pytest.mark.parametrize("mesh", [{"data": 2}, {"tensor": 2}, {"fsdp": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("form", ["padding on the left", "packed", "sinks"])
def test_each_device_of_a_mesh_runs_the_kernel_on_its_part(arrays, monkeypatch, mesh, form):
  parts = []

  def spy(query, key, value, *, causal, **given):  # the kernel of a TPU, for which XLA stands in
    parts.append((query.shape, key.shape))
    return by_xla(query, key, value, causal=causal, **given)

  monkeypatch.setattr(rules, "platform", lambda: "tpu")
  monkeypatch.setattr(attention_kernels, "splash", spy)
  half = tuple(x.astype(jnp.bfloat16) for x in arrays)
  expected = both(by_xla, half, FORMS[form])
  with jax.set_mesh(sharding.make_mesh(MeshConfig(**{"data": 1} | mesh))):
    found = both(attend, half, FORMS[form])
    heads = mesh.get("tensor", 1)
    batch = B if mesh == {"tensor": 2} else B // 2
    assert parts == [((batch, L, N // heads, H), (batch, L, N_KV // heads, H))]
    assert_close(found, expected, 0.02)
  with jax.set_mesh(sharding.make_mesh(MeshConfig(data=1, tensor=4))):  # does not divide the heads of keys
    jax.eval_shape(functools.partial(attend, **FORMS[form]), *half)
  assert len(parts) == 1


def test_the_platform_is_that_of_the_mesh_in_use():
  assert rules.platform() == "cpu"
  described = types.SimpleNamespace(platform="tpu")
  mesh = types.SimpleNamespace(empty=False, abstract_device=described)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax.sharding, "get_abstract_mesh", lambda: mesh)
    assert rules.platform() == "tpu"


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 1, 2, 3, 5, 9])
def test_tiles_that_hold_a_pair_are_counted(causal, window):
  for length, tile in ((8, 2), (12, 4), (12, 3)):
    behind = np.arange(length)[:, None] - np.arange(length)[None]
    seen = (behind >= 0) | (not causal)
    seen &= (abs(behind) < window) | (not window)
    starts = range(0, length, tile)
    expected = sum(seen[i : i + tile, j : j + tile].any() for i in starts for j in starts)
    assert attention_kernels.tiles_seen(length, tile, causal, window) == expected
