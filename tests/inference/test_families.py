"""Every structure of published models, at toy size: token by token equals the whole, in a batch of different lengths."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.inference.model import dropless
from moe_jax.models import PRESETS
from moe_jax.nn import Transformer
from moe_jax.nn.cache import cache_bytes
from tests.models.test_tiny_models import NAMES
from tests.nn.layer import randomized

V, PROMPT, TOTAL = 40, 8, 11
PAD_B = np.array([0, 5], np.int32)


@jax.jit
def whole_and_by_token(model, tokens_BL, padded_BL):
  """(logits of the whole forward pass, those behind the prompt and behind each later token)."""
  logits, cache = model.prefill(padded_BL[:, :PROMPT], PAD_B, TOTAL)

  def one(cache, token_B):
    logits_BLV, cache = model.extend(token_B[:, None], cache)
    return cache, logits_BLV[:, 0]

  _, later = jax.lax.scan(one, cache, padded_BL[:, PROMPT:].T)
  return model(tokens_BL)[0], jnp.concatenate([logits, later.swapaxes(0, 1)], axis=1)


@pytest.mark.parametrize("name", NAMES)
def test_token_by_token_equals_the_whole(name):
  config = dataclasses.replace(PRESETS[f"{name}_tiny"].model, compute_dtype="float32", remat="none")
  model = dropless(randomized(lambda: Transformer(config, V, rngs=nnx.Rngs(0))))
  tokens = np.random.default_rng(0).integers(0, V, (2, TOTAL)).astype(np.int32)
  padded = np.stack(
    [np.concatenate([np.zeros(pad, np.int32), row[: TOTAL - pad]]) for pad, row in zip(PAD_B, tokens)]
  )
  whole, found = whole_and_by_token(model, tokens, padded)
  for b, pad in enumerate(PAD_B):
    expected = whole[b, PROMPT - pad - 1 : TOTAL - pad]
    np.testing.assert_allclose(found[b], expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
  cache = jax.eval_shape(lambda: model.init_cache(PAD_B, TOTAL))
  bytes_ = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.layers))
  assert bytes_ == 2 * cache_bytes(config, TOTAL, "float32").total
