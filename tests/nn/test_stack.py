"""Models of different blocks: who sees whom, what each layer draws and reports, and steps that do not depend on how they run."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.config import BlockConfig, MeshConfig, ModelConfig, MoEConfig, Segment
from moe_jax.errors import InputError
from moe_jax.nn import Context, MoE, Transformer
from moe_jax.nn.aux import by_layer, moe_auxes
from moe_jax.nn.build import resolve_moe
from moe_jax.nn.ffn import FFNS, MLP, GatedMLP, ParallelMoE
from moe_jax.nn.residual import RESIDUALS
from moe_jax.nn.routers import Router
from moe_jax.ops.routing import make_choice
from moe_jax.ops.routing.common import in_groups
from tests import tiny
from tests.nn.layer import randomized

L, V = 10, 16
SIZES = {"model_dim": 16, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "dense_dim": 16, "remat": "none"}


def segments(*patterns, **fields):
  """A model whose segments are (blocks of the pattern, repetitions)."""
  return ModelConfig(**SIZES | fields, segments=tuple(Segment(tuple(p), n) for p, n in patterns))


# --- parts ---


def test_a_parallel_part_is_added_to_the_experts():
  sizes = {"num_experts": 4, "expert_dim": 8, "balancer": "switch_loss:0.1"}
  layer = lambda: ParallelMoE(MoE(8, rngs=nnx.Rngs(0), **sizes), MLP(8, 12, rngs=nnx.Rngs(0)))
  both = randomized(layer)
  x_BLD = np.random.default_rng(0).normal(size=(2, 4, 8)).astype(np.float32)
  context = Context(np.arange(8).reshape(2, 4) < 7, train=True)
  run = jax.jit(lambda both: (both(x_BLD, context), both.moe(x_BLD, context), both.mlp(x_BLD)))
  (y_BLD, aux), (routed_BLD, expected), (dense_BLD, _) = run(both)
  np.testing.assert_allclose(y_BLD, routed_BLD + dense_BLD, rtol=1e-6, atol=1e-6)
  assert min(np.abs(routed_BLD).max(), np.abs(dense_BLD).max()) > 0.1
  jax.tree.map(np.testing.assert_array_equal, aux, expected)


def test_shared_experts_have_a_width_of_their_own():
  moe = MoEConfig(num_experts=4, expert_dim=8, num_shared_experts=2, shared_expert_dim=3)
  width = lambda moe: nnx.eval_shape(lambda: FFNS["moe"](resolve_moe(moe), 8, "swiglu", 1.0, nnx.Rngs(0)))
  assert width(moe).shared.w_up_DF.shape == (8, 2 * 3)
  assert width(dataclasses.replace(moe, shared_expert_dim=0)).shared.w_up_DF.shape == (8, 2 * 8)
  with pytest.raises(InputError, match="--shared_expert_dim=3: needs shared experts"):
    dataclasses.replace(moe, num_shared_experts=0).check()
  with pytest.raises(InputError, match="--shared_expert_dim=-1: 0"):
    dataclasses.replace(moe, shared_expert_dim=-1).check()


def test_a_gate_scales_what_shared_experts_add_to_a_token():
  moe = MoEConfig(num_experts=4, expert_dim=8, num_shared_experts=2, shared_expert_gate=True)
  layer = randomized(lambda: FFNS["moe"](resolve_moe(moe), 8, "swiglu", 1.0, nnx.Rngs(0)))
  x_BLD = np.random.default_rng(0).normal(size=(2, 4, 8)).astype(np.float32)
  run = jax.jit(lambda layer: layer(x_BLD)[0])
  y_BLD = run(layer)
  shared, layer.shared = layer.shared, None
  scale_BL = 1 / (1 + np.exp(-x_BLD @ np.asarray(shared.w_shared_gate_D[...])))
  added_BLD = jax.jit(lambda mlp: super(GatedMLP, mlp).__call__(jnp.asarray(x_BLD))[0])(shared)
  np.testing.assert_allclose(y_BLD, run(layer) + scale_BL[..., None] * added_BLD, rtol=1e-5, atol=1e-5)
  with pytest.raises(InputError, match="--shared_expert_gate=True: needs shared experts"):
    dataclasses.replace(moe, num_shared_experts=0).check()


@pytest.mark.parametrize("spec, alpha, beta", [("pre_norm", None, 1.0), ("normed_input:1.5:0.7", 1.5, 0.7)])
def test_residuals_are_their_formulas(spec, alpha, beta):
  """x + part(n), and MiniMax-01's alpha n + beta part(n), where n = norm(x)."""
  x_BLD = np.random.default_rng(0).normal(size=(2, 4, 8))
  residual = RESIDUALS.resolve(spec)(dim=8, norm_eps=0.1)
  residual.norm.scale_D.set_value(jnp.arange(8.0))
  y_BLD, aux = residual(lambda x, context: (jnp.sin(x), "aux"), jnp.asarray(x_BLD, jnp.float32), Context())
  normed = x_BLD / np.sqrt((x_BLD**2).mean(axis=-1, keepdims=True) + 0.1) * np.arange(8)
  stream = x_BLD if alpha is None else alpha * normed
  np.testing.assert_allclose(y_BLD, stream + beta * np.sin(normed), rtol=1e-5, atol=1e-5)
  assert aux == "aux"


@pytest.mark.parametrize("spec", ["pre_norm:0.25", "normed_input:dropout=0.25:beta=0.5"])
def test_dropout_is_of_what_a_part_adds(spec):
  """Elements drop in training with the given probability, by sequence, layer and part, and the expectation stays."""
  size, length, scale = 16, 128, 0.5 if "beta" in spec else 1.0
  mixer, ffn = (RESIDUALS.resolve(spec)(dim=size, part_number=number) for number in (0, 1))
  part = lambda x_BLD, context: (jnp.ones_like(x_BLD), None)
  given = Context(key_B=jax.random.split(jax.random.key(0), 2), train=True)
  x_BLD = jnp.zeros((2, length, size))

  @jax.jit
  def added():
    contexts = {"drawn": given, "layer": given.of_layer(1, None)}
    contexts |= {"evaluation": given._replace(train=False), "no keys": given._replace(key_B=None)}
    return {n: mixer(part, x_BLD, c)[0] for n, c in contexts.items()} | {"ffn": ffn(part, x_BLD, given)[0]}

  ys = {name: np.asarray(y) for name, y in added().items()}
  for name in ("evaluation", "no keys"):
    np.testing.assert_allclose(ys[name], scale, rtol=1e-6, err_msg=name)
  kept = ys["drawn"] > 0
  np.testing.assert_allclose(ys["drawn"][kept], scale / 0.75, rtol=1e-6)

  def within(found, share, count):
    assert abs(found - share) < 5 * np.sqrt(share * (1 - share) / count), (found, share)

  within(kept.mean(), 0.75, kept.size)
  agree = 0.75**2 + 0.25**2  # of independent draws
  for other in ("layer", "ffn"):
    within((kept == (ys[other] > 0)).mean(), agree, kept.size)
  within((kept[0] == kept[1]).mean(), agree, kept[0].size)  # another sequence
  within((kept[:, 1:] == kept[:, :-1]).mean(), agree, kept[:, 1:].size)  # another token
  with pytest.raises(InputError, match=r"dropout must be in \[0, 1\), got 1.0"):
    RESIDUALS.resolve("pre_norm:1")(dim=size)


# --- who sees whom ---

DENSE, WINDOW = BlockConfig(ffn="mlp"), BlockConfig("attention:window=4", "mlp")
EXPERTS = BlockConfig(moe=MoEConfig(num_experts=4, expert_dim=8, dispatcher="dropless"))
BEHIND_LL = np.arange(L)[:, None] - np.arange(L)[None]
VALID_L = np.arange(L) < 7


@pytest.mark.parametrize(
  "pattern, causal, expected_LL",
  [
    ([WINDOW], True, (BEHIND_LL >= 0) & (BEHIND_LL < 4)),
    ([WINDOW, WINDOW], True, (BEHIND_LL >= 0) & (BEHIND_LL < 7)),
    ([WINDOW, DENSE], True, BEHIND_LL >= 0),
    ([DENSE], False, np.tile(VALID_L, (L, 1))),
    ([EXPERTS], False, np.tile(VALID_L, (L, 1))),
    ([WINDOW], False, VALID_L & (np.abs(BEHIND_LL) < 4)),
  ],
  ids=[
    "window",
    "two windows",
    "window and full",
    "bidirectional",
    "bidirectional experts",
    "bidirectional window",
  ],
)
def test_who_sees_whom(pattern, causal, expected_LL):
  """Changing one token changes the logits of exactly those positions that see it; the last three are padding."""
  model = Transformer(segments((pattern, 1), causal=causal), V, rngs=nnx.Rngs(0))
  rng = np.random.default_rng(0)
  base_L = rng.integers(0, V, L)
  changed_LL = np.where(np.eye(L, dtype=bool), (base_L + 5) % V, base_L)  # row j: with another token at j
  tokens = np.concatenate([changed_LL, base_L[None]]).astype(np.int32)
  mask = np.broadcast_to(VALID_L, tokens.shape)
  logits = np.asarray(jax.jit(lambda model: model(tokens, Context(mask))[0])(model))
  seen_LL = (np.abs(logits[:-1] - logits[-1]).max(axis=-1) > 1e-5).T  # [position, token that was changed]
  real = seen_LL[VALID_L]
  np.testing.assert_array_equal(real, expected_LL[VALID_L])
  assert real[:, VALID_L].any() and not real[:, ~VALID_L].any()


# --- what layers draw ---


class Draws(Router):
  """Its logits are what the key of each group gives."""

  def __init__(self, num_experts):
    self.choose = make_choice("softmax_topk", num_experts, 1).choose
    self.num_experts = num_experts

  def __call__(self, x_GTD, context):
    shape = (x_GTD.shape[1], self.num_experts)
    noise_GTE = jax.vmap(lambda key: jax.random.normal(key, shape))(context.key)
    return in_groups(self.choose, noise_GTE, context=context)


def test_layers_of_a_model_draw_independently():
  """Also blocks of one pattern, its repetitions, and other segments."""
  moe = MoEConfig(num_experts=8, num_experts_per_token=1, expert_dim=8, router=Draws)
  block = BlockConfig(moe=moe)
  model = Transformer(segments(([block], 2), ([block, DENSE, block], 2)), V, rngs=nnx.Rngs(0))
  context = Context(key_B=jax.random.split(jax.random.key(0), 2), train=True, record_logits=True)
  run = jax.jit(lambda model: moe_auxes(model(np.zeros((2, 64), np.int32), context)[1]))
  streams = np.concatenate([aux.logits_BLE.reshape(2 * 2, -1) for aux in run(model)])  # by layer and sequence
  assert streams.shape == (6 * 2, 64 * 8)
  between = np.corrcoef(streams) - np.eye(12)
  assert np.abs(between).max() < 0.25, between  # 5 standard deviations


# --- all at once ---

# As in DeepSeek-V4: the first layers with experts choose by a frozen table, here with other numbers of experts, too.
FIRST = MoEConfig(
  num_experts=4,
  num_experts_per_token=1,
  expert_dim=16,
  router="frozen_table_topk:vocab_size=32",
  balancers="switch_loss:0.1",
  dispatcher="sorted",
  capacity_factor=1.0,
)
FULL = BlockConfig(ffn="parallel_moe", residual="normed_input:1.5:0.7:0.1")
PATTERNS = (
  Segment((BlockConfig(ffn="mlp"),)),
  Segment((BlockConfig("attention:window=4", moe=FIRST),), 2),
  Segment((BlockConfig("attention:window=4", "mlp"), FULL), 2),
)


@functools.cache
def step(**fields):
  fields = {
    "num_layers": 3,
    "experts": "expert_dropout:0.2",
    "balancers": "z_loss:0.01,loss_free_bias",
  } | fields
  config = tiny.change(tiny.CONFIG, qk_norm=True, **fields)
  config = dataclasses.replace(config, model=dataclasses.replace(config.model, segments=PATTERNS))
  return tiny.one_step(config, tiny.make_batch())


def plain():
  return step(scan_layers=False, remat="none")


def test_what_each_layer_reports():
  """Counts and MaxVio of a step are before capacity; experts that a layer does not have are NaN."""
  metrics = plain()["metrics"]
  counts_RE, num_tokens = metrics["tokens_per_expert"], tiny.make_batch()["mask_BL"].sum()
  assert counts_RE.shape == (4, 8)
  np.testing.assert_array_equal(np.isnan(counts_RE), [[False] * 4 + [True] * 4] * 2 + [[False] * 8] * 2)
  np.testing.assert_array_equal(np.nansum(counts_RE, axis=1), num_tokens * np.array([1, 1, 2, 2]))
  np.testing.assert_array_equal(counts_RE[0], counts_RE[1])  # one table
  assert np.all(metrics["dropped_fraction"] > 0.01)
  max_vio_R = np.nanmax(counts_RE, axis=1) / np.nanmean(counts_RE, axis=1) - 1
  np.testing.assert_allclose(metrics["max_vio"], max_vio_R, rtol=1e-6)
  assert metrics["switch_loss"].shape == (2,) and metrics["z_loss"].shape == (2,)
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves((plain()["gradients"], plain()["balancer"])))


@pytest.mark.parametrize(
  "fields",
  [
    {"remat": "dots"},
    {"remat": "full", "accumulation": 2, "mesh": MeshConfig(data=1, fsdp=2, expert=2, tensor=2)},
  ],
  ids=["scanned", "eight devices"],
)
def test_a_step_of_all_of_these_is_the_same(fields):
  """Looped over, recomputed, in two micro-batches, on eight devices: with jitter, and units and what parts add that drop."""
  tiny.assert_same(step(**fields), plain())


def test_layers_are_reported_in_the_order_of_the_model():
  """Two segments; the second repeats two blocks, of which one has fewer experts."""
  first, odd, even = np.full((1, 3), 0.0), np.array([[1.0] * 3, [3.0] * 3]), np.array([[2.0] * 2, [4.0] * 2])
  of_layers = by_layer([[jnp.asarray(first)], [jnp.asarray(odd), jnp.asarray(even)]])
  nan = np.nan
  expected = [[0, 0, 0], [1, 1, 1], [2, 2, nan], [3, 3, 3], [4, 4, nan]]
  np.testing.assert_array_equal(of_layers, expected)
