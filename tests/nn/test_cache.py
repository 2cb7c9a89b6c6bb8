"""Caches: reading a prompt and then token by token gives the logits of the whole forward pass, for every mixer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.config import BlockConfig, ModelConfig, MoEConfig, Segment
from moe_jax.errors import InputError
from moe_jax.nn import Transformer
from moe_jax.nn.cache import cache_bytes
from tests.nn.layer import randomized

V, PROMPT, TOTAL = 16, 6, 13
LENGTHS = np.array([6, 3, 1])  # of the prompts
SIZES = {"model_dim": 16, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "dense_dim": 16, "remat": "none"}
SPECS = {
  "attention": "attention",
  "everything at once": "attention:sinks=true:qkv_bias=true:out_bias=true:rotary_fraction=0.5:clip_qkv=2:yarn_factor=4:yarn_length=8",
  "window": "attention:window=4:sinks=true",
  "mla": "mla:query_rank=8:yarn_factor=4:yarn_length=8:yarn_mscale_all_dim=1",
  "mla of other widths": "mla:kv_rank=5:nope_dim=6:rope_dim=2:value_dim=3",
  "lightning": "lightning:chunk=4",
  "low rank": "low_rank:rank=2:mixer=attention;window=4",
}
MOE = MoEConfig(num_experts=4, expert_dim=8)


def model_of(*blocks, **fields):
  segments = (Segment(blocks[:1]), Segment(blocks, 2))
  return randomized(
    lambda: Transformer(ModelConfig(**SIZES | fields, segments=segments), V, rngs=nnx.Rngs(0))
  )


@pytest.fixture(scope="module", params=[*SPECS, "one of each"])
def read(request):
  """(model, tokens, logits of the whole forward pass for each position of each sequence)."""
  if request.param == "one of each":  # with experts, as in MiniMax-01 and gpt-oss
    specs = ("lightning:chunk=4", "attention:window=4", "mla")
    model = model_of(*(BlockConfig(spec, "moe", "normed_input:1.5:0.7", MOE) for spec in specs), qk_norm=True)
  else:
    model = model_of(BlockConfig(SPECS[request.param], "mlp"), qk_norm=request.param == "attention")
  tokens = np.random.default_rng(0).integers(0, V, (len(LENGTHS), TOTAL)).astype(np.int32)
  return model, tokens, np.asarray(jax.jit(lambda model: model(tokens)[0])(model))


@functools.partial(jax.jit, static_argnames="length")
def prefill(model, tokens, pad_B, length=TOTAL):
  return model.prefill(tokens, pad_B, length)


extend = jax.jit(lambda model, tokens, cache: model.extend(tokens, cache))


def begin(model, tokens):
  """The prompts, which end together, behind padding that holds anything."""
  pad_B = PROMPT - LENGTHS
  rows = [np.concatenate([np.full(pad, 7), row[: PROMPT - pad]]) for pad, row in zip(pad_B, tokens)]
  return prefill(model, np.stack(rows).astype(np.int32), jnp.asarray(pad_B, jnp.int32))


def close(found, expected):
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_token_by_token_equals_the_whole(read):
  model, tokens, whole = read
  logits, cache = begin(model, tokens)
  for position_B in LENGTHS + np.arange(TOTAL - PROMPT + 1)[:, None]:
    close(logits[:, 0], whole[np.arange(3), position_B - 1])
    if position_B[0] < TOTAL:
      logits, cache = extend(model, tokens[np.arange(3), position_B][:, None], cache)
  assert cache.start == TOTAL


def test_several_tokens_at_once_equal_the_whole(read):
  """More of them than the window is long, from an empty cache too: for latent attention all in the absorbed form."""
  model, tokens, whole = read
  cache = model.init_cache(jnp.zeros(3, jnp.int32), TOTAL)
  logits, cache = extend(model, tokens[:, :8], cache)
  close(logits, whole[:, :8])
  logits, cache = extend(model, tokens[:, 8:], cache)
  close(logits, whole[:, 8:])


def test_in_bfloat16_too():
  """Only the recurrent state is float32; what is added to the stream has the type of the stream."""
  blocks = (BlockConfig(spec, "mlp") for spec in ("lightning:chunk=4", "attention:sinks=true", "mla"))
  model = model_of(*blocks, compute_dtype="bfloat16")
  tokens = np.random.default_rng(0).integers(0, V, (len(LENGTHS), TOTAL)).astype(np.int32)
  whole = np.asarray(jax.jit(lambda model: model(tokens)[0])(model))
  logits, cache = begin(model, tokens)
  assert {str(leaf.dtype) for leaf in jax.tree.leaves(cache.layers)} == {"float32", "bfloat16"}
  rows = np.arange(len(LENGTHS))
  after, _ = extend(model, tokens[rows, LENGTHS][:, None], cache)
  for found, position_B in ((logits, LENGTHS - 1), (after, LENGTHS)):
    expected = whole[rows, position_B]
    np.testing.assert_allclose(
      found[:, 0], expected, atol=0.05 * np.abs(expected).max()
    )  # 8 bits, six blocks


def test_bytes_are_those_that_the_cache_has(read):
  model = read[0]
  for length in (2, TOTAL):
    cache = jax.eval_shape(lambda length=length: model.init_cache(jnp.zeros(3, jnp.int32), length))
    found = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.layers))
    assert 3 * cache_bytes(model.config, length, "float32").total == found


@pytest.mark.parametrize(
  "spec, per_token, fixed",
  [
    ("attention", 2 * 2 * 4 * 2, 0),  # keys and values, heads, width, bytes
    ("attention:window=4", 0, 4 * 2 * 2 * 4 * 2),
    ("mla:kv_rank=5:rope_dim=2", (5 + 2) * 2, 0),
    ("lightning", 0, 4 * 4 * 4 * 4),  # heads, and a matrix in float32
  ],
)
def test_bytes_of_one_sequence(spec, per_token, fixed):
  """Of three layers. Short sequences need no whole window."""
  config = ModelConfig(**SIZES, mixer=spec, moe=MOE)
  found = cache_bytes(config, 100)
  assert found == (3 * per_token, 3 * fixed, 3 * (100 * per_token + fixed))
  if "window" in spec:
    assert cache_bytes(config, 3).total == 3 * fixed * 3 // 4


def test_a_step_holds_the_cache_once():
  """In the compiled program, beside the cache that it is given and overwrites, there is no second one."""
  config = ModelConfig(**SIZES, segments=(Segment((BlockConfig(ffn="mlp"),), 8),))
  model = randomized(lambda: Transformer(config, V, rngs=nnx.Rngs(0)))
  cache = jax.eval_shape(lambda: model.init_cache(jnp.zeros(2, jnp.int32), 4096))
  step = jax.jit(lambda model, tokens_BL, cache: model.extend(tokens_BL, cache), donate_argnums=2)
  memory = step.lower(model, jnp.zeros((2, 1), jnp.int32), cache).compile().memory_analysis()
  total = 2 * cache_bytes(config, 4096, "float32").total
  assert memory.alias_size_in_bytes >= total
  assert memory.temp_size_in_bytes < total / 2


def test_what_keeps_no_cache_says_so():
  class Mean(nnx.Module):
    def __init__(self, dim):
      pass

  init = lambda config: Transformer(config, V, rngs=nnx.Rngs(0)).init_cache(jnp.zeros(1, jnp.int32), 4)
  with pytest.raises(
    InputError, match="mixer Mean: keeps no cache; give it the methods init_cache and extend"
  ):
    init(ModelConfig(**SIZES, mixer=Mean, moe=MOE))
  for spec in ("attention", "mla"):
    with pytest.raises(InputError, match=f"mixer {spec}: sees later positions"):
      init(ModelConfig(**SIZES, mixer=spec, moe=MOE, causal=False))
