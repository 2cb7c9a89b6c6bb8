"""The decoder: its formulas, who sees whom, its size, its first weights, what it reports per layer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.errors import InputError
from moe_jax.nn import Context, Transformer
from moe_jax.nn.aux import losses_by_name, moe_auxes, num_moe_layers
from moe_jax.nn.mixers.attention import Attention
from moe_jax.nn.norm import RMSNorm
from moe_jax.ops.rotary import Rotary

V, L = 32, 12
CONFIG = ModelConfig(
  num_layers=2,
  model_dim=16,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  dense_dim=20,
  remat="none",
  moe=MoEConfig(
    num_experts=4, num_experts_per_token=2, expert_dim=8, dispatcher="sorted", capacity_factor=0.5
  ),
)
# One dense layer, then two periods of a dense layer and one with experts; all with ReLU.
MIXED = dataclasses.replace(
  CONFIG,
  num_layers=5,
  num_dense_first=1,
  moe_every=2,
  activation="relu",
  moe=dataclasses.replace(
    CONFIG.moe, num_shared_experts=2, experts="relu", balancers="switch_loss:0.1,z_loss:0.1"
  ),
)

# The input axes of each matrix, whose product is its fan-in.
INPUTS = {"DNH": "D", "NHD": "NH", "DF": "D", "FD": "F", "DE": "D", "EDF": "D", "EFD": "F", "DV": "D"}


def change(config=CONFIG, **fields):
  """`config` with fields of the model or its MoE part replaced."""
  of_moe = {name: value for name, value in fields.items() if hasattr(config.moe, name)}
  of_model = {name: value for name, value in fields.items() if name not in of_moe}
  return dataclasses.replace(config, **of_model, moe=dataclasses.replace(config.moe, **of_moe))


def abstract(config):
  """The model's static part, and its variables without values."""
  graphdefs = []

  def init():
    graphdef, state = nnx.split(Transformer(config, V, rngs=nnx.Rngs(0)))
    graphdefs.append(graphdef)
    return state

  state = jax.eval_shape(init)
  return graphdefs[0], state


def fan_in(axes, shape):
  size = dict(zip(axes, shape[-len(axes) :], strict=True))
  return np.prod([size[axis] for axis in INPUTS[axes]])


def build(config):
  """A model with random weights, made without compiling; the same for all methods and compute types."""
  graphdef, state = abstract(config)
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    shape, name = leaf.get_value().shape, path[-1]
    if name.startswith("scale"):
      return leaf.replace(np.ones(shape, np.float32))
    axes = name.split("_")[-1]
    scale = fan_in(axes, shape) ** -0.5 if axes in INPUTS else 1
    return leaf.replace((scale * rng.normal(size=shape)).astype(np.float32))

  is_array = lambda leaf: hasattr(leaf.get_value(), "shape")
  flat = [(path, draw(path, leaf) if is_array(leaf) else leaf) for path, leaf in nnx.to_flat_state(state)]
  return nnx.merge(graphdef, nnx.from_flat_state(flat))


@functools.partial(jax.jit, static_argnames=("graphdef", "train"))
def _forward(graphdef, state, tokens_BL, mask_BL, train):
  return nnx.merge(graphdef, state)(tokens_BL, Context(mask_BL, train=train))


def forward(model, tokens_BL, mask_BL=None, train=True):
  """Logits and aux as numpy. Training, without keys: with `capacity_factor` and without draws."""
  mask_BL = np.ones(tokens_BL.shape, bool) if mask_BL is None else mask_BL
  return jax.device_get(_forward(*nnx.split(model), tokens_BL, mask_BL, train))


def tokens(seed=0, batch=2):
  return np.random.default_rng(seed).integers(0, V, (batch, L)).astype(np.int32)


def dropped(aux):
  return sum(layer.tokens_per_expert_BE.sum() - layer.kept_per_expert_E.sum() for layer in moe_auxes(aux))


def test_rms_norm_is_its_formula(rng):
  x = rng.normal(size=(2, 3, 5)).astype(np.float32)
  norm = RMSNorm(5, 0.1)
  norm.scale_D.set_value(np.arange(5, dtype=np.float32))
  expected = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 0.1) * np.arange(5)
  np.testing.assert_allclose(norm(x), expected, rtol=1e-5)
  assert norm(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


def reference_rotate(x_BLNH, theta):
  """The pair (i, i + H/2) as a complex number times exp(i * angle)."""
  half = x_BLNH.shape[-1] // 2
  angle_LH = np.arange(x_BLNH.shape[1])[:, None] / theta ** (2 * np.arange(half) / (2 * half))
  turned = (x_BLNH[..., :half] + 1j * x_BLNH[..., half:]) * np.exp(1j * angle_LH)[None, :, None, :]
  return np.concatenate([turned.real, turned.imag], axis=-1)


def test_rotary_scores_depend_on_distance_only(rng):
  theta, heads = 100.0, (1, L, 1, 8)
  same = lambda: jnp.asarray(np.broadcast_to(rng.normal(size=8), heads), jnp.float32)
  rotate = functools.partial(Rotary(8, theta), position_XL=jnp.arange(L)[None])
  query, key = np.asarray(rotate(same())), np.asarray(rotate(same()))
  scores = np.einsum("BLNH,BMNH->LM", query, key)
  for distance in range(-L + 1, L):
    np.testing.assert_allclose(np.diagonal(scores, distance), np.diagonal(scores, distance)[0], atol=1e-5)
  assert np.ptp(scores[0]) > 0.1
  norms = np.linalg.norm(query, axis=-1)
  np.testing.assert_allclose(norms, norms[0, 0, 0], rtol=1e-6)


def test_attention_equals_the_reference_with_repeated_heads(rng):
  """Grouped queries, causal mask, rotary positions, and norms of their own for queries and for keys."""
  n, n_kv, h, d = CONFIG.num_heads, CONFIG.num_kv_heads, CONFIG.head_dim, CONFIG.model_dim
  attention = Attention(d, n, n_kv, h, qk_norm=True, norm_eps=0.1, rngs=nnx.Rngs(0))
  scales = rng.uniform(0.5, 2, (2, h)).astype(np.float32)
  for norm, scale_H in zip((attention.query_norm, attention.key_norm), scales, strict=True):
    norm.scale_D.set_value(jnp.asarray(scale_H))
  normed = lambda x, scale_H: x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 0.1) * scale_H
  x_BLD = rng.normal(size=(2, L, d)).astype(np.float32)
  project = lambda w: np.einsum("BLD,DNH->BLNH", x_BLD, np.asarray(w.get_value(), np.float64))
  query = reference_rotate(normed(project(attention.w_query_DNH), scales[0]), CONFIG.rope_theta)
  key = reference_rotate(normed(project(attention.w_key_DNH), scales[1]), CONFIG.rope_theta)
  value, out = project(attention.w_value_DNH), np.asarray(attention.w_out_NHD.get_value(), np.float64)
  expected = np.zeros((2, L, d))
  for b, t, head in np.ndindex(2, L, n):
    shared = head // (n // n_kv)
    scores = key[b, : t + 1, shared] @ query[b, t, head] / np.sqrt(h)
    probs = np.exp(scores - scores.max())
    expected[b, t] += (probs / probs.sum()) @ value[b, : t + 1, shared] @ out[head]
  found = jax.jit(lambda x: attention(x, Context())[0])(x_BLD)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dispatcher", ["sorted", "dropless"])
def test_no_token_sees_a_later_one(dispatcher):
  """Neither in attention nor by taking an expert's last slot, and padding is nothing but later tokens."""
  model = build(change(dispatcher=dispatcher))
  before = tokens()
  logits, aux = forward(model, before)
  assert (dropped(aux) > 0) == (dispatcher == "sorted")
  t = L // 2
  for seed in (1, 2, 3):
    after = np.concatenate([before[:, :t], tokens(seed)[:, t:]], axis=1)
    changed, _ = forward(model, after)
    np.testing.assert_allclose(changed[:, :t], logits[:, :t], atol=1e-6)
    assert np.abs(changed[:, t:] - logits[:, t:]).max() > 0.01

  mask = np.broadcast_to(np.arange(L) < t, before.shape)
  padded, aux = forward(model, before, mask)
  np.testing.assert_allclose(padded[:, :t], logits[:, :t], atol=1e-6)
  (layers,) = moe_auxes(aux)
  assert layers.tokens_per_expert_BE.sum(axis=(1, 2)).tolist() == [mask.sum() * 2] * 2
  if dispatcher == "dropless":  # capacity counts the padded length
    short, _ = forward(model, before[:, :t])
    np.testing.assert_allclose(short, logits[:, :t], atol=1e-5)


def test_gshard_leaks_the_future_where_it_drops():
  """A later token's first choice takes the slot of an earlier token's second one: the published method."""
  model = build(change(router="gshard_top2", accept_leaks="gshard_top2", eval_capacity_factor=4.0))
  t = L // 2

  def leak(seed, train):
    before = tokens(seed)
    after = np.concatenate([before[:, :t], tokens(seed + 100)[:, t:]], axis=1)
    logits, aux = forward(model, before, train=train)
    assert (dropped(aux) > 0) == train
    return np.abs(forward(model, after, train=train)[0] - logits)[:, :t].max()

  assert any(leak(seed, train=True) > 1e-3 for seed in range(20))
  assert all(leak(seed, train=False) <= 1e-6 for seed in range(5))


def test_a_router_that_leaks_is_refused_unless_accepted_by_name():
  with pytest.raises(InputError) as error:
    build(change(router="gshard_top2"))
  assert "--accept_leaks=gshard_top2" in str(error.value) and "\n" not in str(error.value)
  with pytest.raises(InputError):
    build(change(router="gshard_top2", accept_leaks="softmax_topk"))
  build(change(router="gshard_top2", dispatcher="dropless"))  # where nothing drops it leaks nothing


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("activation, matrices", [("swiglu", 3), ("relu", 2)])
def test_the_number_of_parameters(tied, activation, matrices):
  config = change(MIXED, tie_embeddings=tied, activation=activation, experts=activation)
  d, moe = config.model_dim, config.moe
  attention = 2 * config.head_dim * d * (config.num_heads + config.num_kv_heads)
  dense = matrices * d * config.dense_dim
  experts = (moe.num_experts + moe.num_shared_experts) * matrices * d * moe.expert_dim + d * moe.num_experts
  expected = 5 * (attention + 2 * d) + 3 * dense + 2 * experts + d + V * d * (1 if tied else 2)
  params = nnx.to_flat_state(nnx.filter_state(abstract(config)[1], nnx.Param))
  assert sum(leaf.size for _, leaf in params) == expected
  assert any("gate" in path[-1] for path, _ in params) == (activation == "swiglu")


def test_aux_is_per_layer():
  """R in front, and each layer reports what it reports alone. Also the reference of the whole model's wiring."""
  model = build(MIXED)
  tokens_BL, mask_BL = tokens(), np.ones((2, L), bool)
  mask_BL[1, 7:] = False
  logits, aux = forward(model, tokens_BL, mask_BL)
  (of_layers,) = moe_auxes(aux)
  assert num_moe_layers(aux) == 2 and all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(aux))
  assert of_layers.tokens_per_expert_BE.shape == (2, 2, 4)
  assert {name: loss.shape for name, loss in losses_by_name(aux).items()} == {
    "switch_loss": (2,),
    "z_loss": (2,),
  }

  @jax.jit
  def one_by_one(model):
    x_BLD, auxes, context = model.embedding_VD.get_value()[tokens_BL], [], Context(mask_BL, train=True)
    for segment in model.segments:
      graphdef, stacked = nnx.split(segment.pattern)
      for r in range(segment.repeats):
        for block in nnx.merge(graphdef, jax.tree.map(lambda leaf, r=r: leaf[r], stacked)).blocks:
          x_BLD = x_BLD + block.mixer(block.mixer_residual.norm(x_BLD), context)[0]
          y_BLD, aux = block.ffn(block.ffn_residual.norm(x_BLD), context)
          x_BLD = x_BLD + y_BLD
          auxes += [] if aux is None else [aux]
    return model.final_norm(x_BLD) @ model.w_head_DV.get_value(), auxes

  expected, auxes = jax.device_get(one_by_one(model))
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
  for r, alone in enumerate(auxes):
    same = lambda of_all, of_one, r=r: np.testing.assert_allclose(of_all[r], of_one, rtol=1e-5)
    jax.tree.map(same, of_layers, alone)
  assert np.any(auxes[0].tokens_per_expert_BE != auxes[1].tokens_per_expert_BE)


@pytest.mark.parametrize("init_scale", [1.0, 0.1])
def test_initial_weights(init_scale):
  config = ModelConfig(3, 48, head_dim=16, dense_dim=64, num_dense_first=1, init_scale=init_scale)
  config = change(config, num_experts=32, expert_dim=24, num_shared_experts=2)
  init = lambda: nnx.split(Transformer(config, V, rngs=nnx.Rngs(0)), nnx.Param, ...)[1]
  params = nnx.to_flat_state(jax.device_get(jax.jit(init)()))
  seen = set()
  for path, leaf in params:
    name, value = path[-1], leaf.get_value()
    assert value.dtype == np.float32
    if not name.startswith("w_"):
      continue
    axes = name.split("_")[-1]
    std = np.sqrt(init_scale / fan_in(axes, value.shape))
    np.testing.assert_allclose(value.std(), std, rtol=0.05, err_msg=str(path))
    assert np.abs(value).max() <= 2.3 * std
    seen.add(axes)
    if path[:2] == ("segments", 1):
      assert value.shape[0] == 2 and np.abs(value[0] - value[1]).max() > std
  assert seen == set(INPUTS)


def test_bfloat16_computes_and_float32_answers():
  logits, aux = forward(build(change(compute_dtype="bfloat16")), tokens())
  assert logits.dtype == np.float32 and np.isfinite(logits).all()
  assert {leaf.dtype for leaf in jax.tree.leaves(aux)} == {np.dtype(np.float32)}
  exact, _ = forward(build(CONFIG), tokens())
  # A rounded router input may move a token to another expert, so only most logits are close.
  assert 0 < np.median(np.abs(logits - exact)) < 0.05 * exact.std()
