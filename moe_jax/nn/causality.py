"""Does a router show a token what comes after it? Measured on a language model, by changing later tokens."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.nn.methods import deciding_method
from moe_jax.nn.transformer import Transformer
from moe_jax.registry import method_name

_VOCAB, _BATCH, _LENGTH, _TRIALS = 32, 4, 16, 4


def future_influence(moe: MoEConfig, *, drops: bool, seed: int = 0) -> float:
  """How much a change in later tokens changes the logits of earlier ones in training: 0 for a causal model.

  The largest absolute difference, over random models of one layer, batches and places of the change.

  Args:
    moe: router, layer, number of experts, K; the dispatcher and the capacity are set here.
    drops: capacity factor 0.5, so that about half of the assignments drop, or none at all.
    seed: of the parameters and the tokens.
  """
  moe = dataclasses.replace(
    moe,
    expert_dim=8,
    accept_leaks=method_name(deciding_method(moe)[1]),
    dispatcher="sorted" if drops else "dropless",
    capacity_factor=0.5,
  )
  config = ModelConfig(
    num_layers=1, model_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, moe=moe, remat="none"
  )
  keys = jax.random.split(jax.random.key(seed), 4)
  graphdef, params, rest = nnx.split(Transformer(config, _VOCAB, rngs=nnx.Rngs(keys[0])), nnx.Param, ...)
  params = _with_noise(params, keys[1])

  @jax.jit
  def logits(tokens_BL):
    model = nnx.merge(graphdef, params, rest)
    domain_B = jnp.arange(_BATCH) % 2
    return model(tokens_BL, key_B=jax.random.split(keys[2], _BATCH), train=True, domain_B=domain_B)[0]

  largest = 0.0
  for trial in range(_TRIALS):
    cut = 3 * (trial + 1)
    one_BL, other_BL = jax.random.randint(jax.random.fold_in(keys[3], trial), (2, _BATCH, _LENGTH), 0, _VOCAB)
    mixed_BL = jnp.concatenate([one_BL[:, :cut], other_BL[:, cut:]], axis=1)
    change_BLV = logits(one_BL) - logits(mixed_BL)
    largest = max(largest, float(jnp.abs(change_BLV[:, :cut]).max()))
  return largest


def _with_noise(params, key):
  """Parameters that start at zero, or small, would route all tokens alike and show nothing."""
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(key, len(leaves))
  noisy = [leaf + 0.5 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)]
  return jax.tree.unflatten(tree, noisy)
