"""The token mixers as modules, with every option, against loops in float64."""

import jax
import numpy as np
import pytest
from flax import nnx

from moe_jax.config import BlockConfig, ModelConfig, Segment
from moe_jax.errors import InputError
from moe_jax.nn import Context, Transformer
from moe_jax.nn.mixers import MIXERS
from moe_jax.ops.rotary import Yarn
from moe_jax.sharding.rules import partition_spec
from tests.nn.layer import float64, randomized
from tests.reference import mixers as reference

L, D, N, N_KV, H, THETA = 9, 12, 4, 2, 8, 100.0
OFFERED = {
  "dim": D, "num_heads": N, "num_kv_heads": N_KV, "head_dim": H, "rope_theta": THETA, "qk_norm": True, "norm_eps": 0.1,
  "num_layers": 5, "init_scale": 1.0,
}  # fmt: skip
YARN = "yarn_factor=4:yarn_length=8:yarn_beta_fast=2:yarn_mscale_all_dim=0.5"
MASK_BL = np.arange(L) < np.array([[L], [6]])


def make(spec, **changed):
  method = MIXERS.resolve(spec)
  return randomized(lambda: method(**OFFERED | changed, rngs=nnx.Rngs(0)))


@pytest.fixture
def x_BLD(rng):
  return rng.normal(size=(2, L, D)).astype(np.float32)


def compare(mixer, x_BLD, expected, layer=0):
  found, aux = jax.jit(lambda m, x: m(x, Context(MASK_BL, layer=layer)))(mixer, x_BLD)
  assert aux is None
  np.testing.assert_allclose(found[MASK_BL], expected[MASK_BL], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
  "spec, changed",
  [
    ("attention:qkv_bias=true:out_bias=true:sinks=true:window=4", {"qk_norm": False}),  # gpt-oss
    (f"attention:{YARN}", {"qk_norm": False}),
    ("attention:qk_norm_over=projection:clip_qkv=0.5", {}),  # OLMoE
    ("attention:rotary_fraction=0.5:qkv_bias=true", {}),
    ("attention:sinks=true:rotary_fraction=0", {"causal": False}),
  ],
)
def test_attention_is_its_formula(x_BLD, spec, changed):
  mixer = make(spec, **changed)
  causal, qk_norm = changed.get("causal", True), changed.get("qk_norm", True)

  def project(w, b, norm=None):
    y = np.einsum("BLD,DNH->BLNH", x_BLD, float64(w))
    y = y if b is None else y + float64(b)
    if norm is not None:
      over = y.reshape(2, L, -1) if "projection" in spec else y
      y = reference.rms_norm(over, float64(norm.scale_D), 0.1).reshape(y.shape)
    return np.clip(y, -0.5, 0.5) if "clip" in spec else y

  query = project(mixer.w_query_DNH, mixer.b_query_NH, mixer.query_norm)
  key = project(mixer.w_key_DNH, mixer.b_key_NH, mixer.key_norm)
  assert (mixer.query_norm is not None) == qk_norm
  value = project(mixer.w_value_DNH, mixer.b_value_NH)
  options = dict(MIXERS.resolve(spec).options)
  dim = round(options["rotary_fraction"] * H)
  frequencies, magnitude = reference.frequencies(dim, THETA) if dim else [], 1.0
  if "yarn" in spec:
    yarn = Yarn(4.0, 8, 2.0, mscale_all_dim=0.5)
    frequencies = np.asarray(mixer.rotary.frequencies(), np.float64)  # tests/ops/test_rotary.py has these
    magnitude = yarn.magnitude(1.0) / yarn.magnitude(0.5)
  turn = lambda x: np.concatenate(
    [reference.rotate(x[..., :dim], frequencies, magnitude=magnitude), x[..., dim:]], axis=-1
  )
  mixed = reference.attention(
    turn(query), turn(key), value, H**-0.5 * (yarn.magnitude(0.5) ** 2 if "yarn" in spec else 1), causal=causal,
    window=options["window"], mask_BL=None if causal else MASK_BL, sink_N=float64(mixer.sink_N),
  )  # fmt: skip
  expected = np.einsum("BLNH,NHD->BLD", mixed, float64(mixer.w_out_NHD))
  compare(mixer, x_BLD, expected if mixer.b_out_D is None else expected + float64(mixer.b_out_D))


@pytest.mark.parametrize(
  "spec, causal",
  [
    ("mla:kv_rank=5:nope_dim=6:rope_dim=4:value_dim=3", True),  # V2-Lite
    (f"mla:query_rank=7:kv_rank=5:nope_dim=6:rope_dim=4:value_dim=3:{YARN}", False),
    ("mla:interleaved=false", True),
  ],
)
def test_latent_attention_is_its_formula(x_BLD, spec, causal):
  """Equations 37 to 47 of 2405.04434, appendix C."""
  mixer = make(spec, causal=causal)
  nope, rope, value_dim, kv_rank = (H, H // 2, H, 4 * H) if "interleaved" in spec else (6, 4, 3, 5)
  frequencies = np.asarray(mixer.rotary.frequencies(), np.float64)
  yarn = Yarn(4.0, 8, 2.0, mscale_all_dim=0.5) if "yarn" in spec else None
  magnitude = yarn.magnitude(1.0) / yarn.magnitude(0.5) if yarn else 1.0
  turn = lambda x: reference.rotate(x, frequencies, "interleaved" not in spec, magnitude)
  if "query_rank" in spec:
    low = reference.rms_norm(x_BLD @ float64(mixer.w_query_down_DX), float64(mixer.query_norm.scale_D))
    query = np.einsum("BLX,XNH->BLNH", low, float64(mixer.w_query_up_XNH))
  else:
    query = np.einsum("BLD,DNH->BLNH", x_BLD, float64(mixer.w_query_DNH))
  latent = reference.rms_norm(x_BLD @ float64(mixer.w_kv_down_DX), float64(mixer.kv_norm.scale_D))
  key_rope = turn((x_BLD @ float64(mixer.w_key_rope_DH))[:, :, None])
  query = np.concatenate([query[..., :nope], turn(query[..., nope:])], axis=-1)
  key = np.einsum("BLX,XNH->BLNH", latent, float64(mixer.w_key_up_XNH))
  key = np.concatenate([key, np.repeat(key_rope, N, axis=2)], axis=-1)
  value = np.einsum("BLX,XNH->BLNH", latent, float64(mixer.w_value_up_XNH))
  assert latent.shape[-1] == kv_rank and key.shape[-1] == nope + rope and value.shape[-1] == value_dim
  scale = (nope + rope) ** -0.5 * (yarn.magnitude(0.5) ** 2 if yarn else 1)
  mixed = reference.attention(query, key, value, scale, causal=causal, mask_BL=None if causal else MASK_BL)
  compare(mixer, x_BLD, np.einsum("BLNH,NHD->BLD", mixed, float64(mixer.w_out_NHD)))


@pytest.mark.parametrize("layer", [0, 3])
def test_lightning_attention_is_its_formula(x_BLD, layer):
  mixer = make("lightning:chunk=4:out_norm_eps=0.1")
  silu = lambda x: x / (1 + np.exp(-x))
  project = lambda w: np.einsum("BLD,DNH->BLNH", x_BLD, float64(w))
  query, key, value = (silu(project(w)) for w in (mixer.w_query_DNH, mixer.w_key_DNH, mixer.w_value_DNH))
  rate_N = [reference.decay_rate(head, N, layer, 5) for head in range(N)]
  mixed, _ = reference.lightning(query, key, value, rate_N)
  normed = reference.rms_norm(mixed.reshape(2, L, -1), float64(mixer.norm.scale_D), 0.1).reshape(mixed.shape)
  gated = normed / (1 + np.exp(-project(mixer.w_out_gate_DNH)))
  compare(mixer, x_BLD, np.einsum("BLNH,NHD->BLD", gated, float64(mixer.w_out_NHD)), layer)


def test_layers_of_a_model_decay_at_rates_of_their_own():
  """A model of 7 lightning blocks and one of softmax, as MiniMax-01: layer 5 of 8 is the fifth of its segment."""
  pattern = (BlockConfig("lightning", "mlp"),) * 7 + (BlockConfig("attention:rotary_fraction=0.5", "mlp"),)
  config = ModelConfig(
    model_dim=8, num_heads=2, num_kv_heads=1, head_dim=4, dense_dim=8, segments=(Segment(pattern),), remat="none"
  )  # fmt: skip
  model = Transformer(config, 16, rngs=nnx.Rngs(0))
  tokens_BL = np.arange(6)[None] % 16
  logits = jax.jit(lambda m: m(tokens_BL)[0])(model)
  x_BLD = model.embedding_VD[...][tokens_BL]
  blocks = nnx.merge(*_first_repetition(model)).blocks
  assert len(blocks) == 8 and blocks[0].mixer.num_layers == 8
  for layer, block in enumerate(blocks):
    x_BLD, _ = block(x_BLD, Context(layer=layer))
  np.testing.assert_allclose(logits, model._logits(x_BLD), rtol=1e-5, atol=1e-5)
  other, _ = blocks[0].mixer(x_BLD, Context(layer=7))
  assert np.abs(other - blocks[0].mixer(x_BLD, Context())[0]).max() > 1e-3


def _first_repetition(model):
  graphdef, state = nnx.split(model.segments[0].pattern)
  return graphdef, jax.tree.map(lambda leaf: leaf[0], state)


def test_heads_are_split_over_the_tensor_axis_and_matrices_over_fsdp():
  """Every matrix of a mixer either has heads or a rank, and only heads are split over tensor."""
  sizes = {"tensor": 2, "fsdp": 2, "expert": 1, "data": 1, "slice": 1}
  for spec in ("attention:qkv_bias=true:out_bias=true:sinks=true", "mla:query_rank=8", "lightning"):
    for path, variable in nnx.to_flat_state(nnx.state(make(spec), nnx.Param)):
      shape, axes = variable.get_value().shape, variable.get_metadata()["logical_axes"]
      assert len(axes) == len(shape), path
      split = partition_spec(axes, shape, sizes)
      has_heads = "N" in path[-1].rpartition("_")[2]
      assert ("tensor" in split) == has_heads, (path, split)
      assert ("fsdp" in split) == ("num_in" in variable.get_metadata() or "b_out" in path[-1]), (path, split)


@pytest.mark.parametrize(
  "spec, changed, message",
  [
    ("attention:qk_norm_over=all", {}, "qk_norm_over must be one of head, projection, got 'all'"),
    ("attention:kernel=cudnn", {}, "kernel must be one of auto, blocks, got 'cudnn'"),
    ("attention:clip_qkv=-1", {}, "clip_qkv must be 0 .* or above, got -1"),
    ("attention:rotary_fraction=0.3", {}, "rotary_fraction must be .* an even part of head_dim=8, got 0.3"),
    ("attention:yarn_factor=0.5", {}, "mixer attention: yarn_factor must be at least 1, got 0.5"),
    ("mla:yarn_factor=2:yarn_beta_slow=64", {}, "mixer mla: yarn_beta_fast must be at least 64.0, got 32.0"),
    ("mla:yarn_beta_slow=0", {}, "mixer mla: yarn_beta_slow must be above 0, got 0.0"),
    ("mla:rope_dim=3", {}, "rope_dim must be even, got 3; set it, e.g. rope_dim=4"),
    ("mla:kv_rank=-1", {}, "kv_rank must be 0 .* or a size, got -1"),
    ("lightning", {"causal": False}, "mixer lightning: is causal only"),
    ("lightning:chunk=0", {}, "chunk must be positive, got 0"),
  ],
)
def test_wrong_options_get_one_line(spec, changed, message):
  with pytest.raises(InputError, match=message):
    MIXERS.resolve(spec)(**OFFERED | changed, rngs=nnx.Rngs(0))
