"""Does a feed-forward part show a token what comes after it? Measured on a language model, by changing later tokens."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.nn.build import different_blocks, resolve
from moe_jax.nn.context import Context
from moe_jax.nn.leaks import deciding_method
from moe_jax.nn.transformer import Transformer
from moe_jax.registry import Spec
from moe_jax.types import PyTree

_VOCAB, _BATCH, _LENGTH, _TRIALS = 32, 4, 16, 4


def future_influence(moe: MoEConfig, *, ffn: Spec = "moe", drops: bool, seed: int = 0) -> float:
  """How much a change in later tokens changes the logits of earlier ones in training: 0 for a causal model.

  The largest absolute difference, over random models of one layer, batches and places of the change.

  Args:
    moe: router, number of experts, K; the dispatcher and the capacity are set here.
    ffn: the feed-forward part.
    drops: capacity factor 0.5, so that about half of the assignments drop, or none at all.
    seed: of the parameters and the tokens.

  Raises:
    InputError: an unknown name, or parts that do not fit together.
  """
  keys = jax.random.split(jax.random.key(seed), 4)
  model = Transformer(_model_config(moe, ffn, drops), _VOCAB, rngs=nnx.Rngs(keys[0]))
  graphdef, params, rest = nnx.split(model, nnx.Param, ...)
  params = _with_noise(params, keys[1])
  context = Context(
    key_B=jax.random.split(keys[2], _BATCH), train=True, domain_B=jnp.arange(_BATCH) % 2, num_domains=2
  )

  @jax.jit
  def logits(tokens_BL):
    return nnx.merge(graphdef, params, rest)(tokens_BL, context)[0]

  largest = 0.0
  for trial in range(_TRIALS):
    cut = 3 * (trial + 1)
    one_BL, other_BL = jax.random.randint(jax.random.fold_in(keys[3], trial), (2, _BATCH, _LENGTH), 0, _VOCAB)
    mixed_BL = jnp.concatenate([one_BL[:, :cut], other_BL[:, cut:]], axis=1)
    change_BLV = logits(one_BL) - logits(mixed_BL)
    largest = max(largest, float(jnp.abs(change_BLV[:, :cut]).max()))
  return largest


def _model_config(moe: MoEConfig, ffn: Spec, drops: bool) -> ModelConfig:
  """A model of one layer that may leak."""
  dispatcher = "sorted" if drops else "dropless"
  moe = dataclasses.replace(moe, expert_dim=8, dispatcher=dispatcher, capacity_factor=0.5)
  config = ModelConfig(
    num_layers=1, model_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, ffn=ffn, moe=moe, remat="none"
  )
  (block,) = different_blocks(resolve(config))
  name = deciding_method(block)[1].partition(":")[0]
  return dataclasses.replace(config, moe=dataclasses.replace(moe, accept_leaks=name))


_ORDER = {"mixer": "0", "mixer_residual": "1", "ffn": "2", "ffn_residual": "3", "router": "", "experts": ""}


def _with_noise(params: PyTree, key: jax.Array) -> PyTree:
  """Parameters that start at zero, or small, would route all tokens alike and show nothing.

  Keys go by the parameters' names in the order of the forward pass, so the draws, and the measured numbers with them,
  do not depend on which module of a layer holds a parameter.
  """
  flat = dict(nnx.to_flat_state(params))
  place = lambda path: [_ORDER.get(part, str(part)) for part in path if _ORDER.get(part, part)]
  paths = sorted(flat, key=place)
  for path, k in zip(paths, jax.random.split(key, len(paths)), strict=True):
    value = flat[path].get_value()
    flat[path] = flat[path].replace(value + 0.5 * jax.random.normal(k, value.shape))
  return nnx.from_flat_state(flat)
