"""Does a part of a model show a token what comes after it? Measured on a language model, by changing later tokens."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.errors import InputError
from moe_jax.nn.build import different_blocks, resolve
from moe_jax.nn.context import Context
from moe_jax.nn.leaks import deciding_method
from moe_jax.nn.transformer import Transformer
from moe_jax.nn.variables import constants, matrices_of
from moe_jax.registry import Spec
from moe_jax.types import Array, PyTree

_VOCAB, _BATCH, _LENGTH, _TRIALS = 32, 4, 16, 4
# A model of one layer, and the sizes of its experts.
SMALL = {"num_layers": 1, "model_dim": 16, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "remat": "none"}
SMALL_EXPERTS = {"expert_dim": 8, "capacity_factor": 0.5}


def future_influence(moe: MoEConfig, *, ffn: Spec = "moe", drops: bool, seed: int = 0) -> float:
  """How much a change in later tokens changes the logits of earlier ones in training: 0 for a causal model.

  The largest absolute difference, over random models of one layer, batches and places of the change.

  Args:
    moe: router, number of experts, K; the dispatcher and the capacity are set here.
    ffn: the feed-forward part.
    drops: capacity factor 0.5, so that about half of the assignments drop, or none at all.
    seed: of the parameters and the tokens.

  Raises:
    InputError: an unknown name, parts that do not fit together, or logits that are not finite.
  """
  return influence(_model_config(moe, ffn, drops), seed)


def influence(config: ModelConfig, seed: int = 0, *, length: int = _LENGTH, train: bool = True) -> float:
  """Returns how much a change in later tokens changes the logits of earlier ones, see `future_influence`.

  Args:
    config: of a small model.
    seed: of the parameters and the tokens.
    length: of the sequences. A part that looks further ahead than four fifths of it is not found.
    train: whether it is measured in training, or in evaluation.

  Raises:
    InputError: if the logits are not finite, so that nothing can be said of them.
  """

  def measure() -> Array:
    key, of_tokens = jax.random.split(jax.random.key(seed))
    with matrices_of(constants(0.1)):
      graphdef, params, rest = nnx.split(Transformer(config, _VOCAB, rngs=nnx.Rngs(0)), nnx.Param, ...)
    params = _with_noise(params, np.random.default_rng(seed))
    keys_B, domain_B = jax.random.split(key, _BATCH), jnp.arange(_BATCH) % 2
    context = Context(key_B=keys_B, train=train, domain_B=domain_B, num_domains=2)
    logits = lambda tokens_BL: nnx.merge(graphdef, params, rest)(tokens_BL, context)[0]

    def change(trial: Array) -> Array:
      is_earlier_L = jnp.arange(length) < length // (_TRIALS + 1) * (trial + 1)
      one_BL, other_BL = jax.random.randint(
        jax.random.fold_in(of_tokens, trial), (2, _BATCH, length), 0, _VOCAB
      )
      mixed_BL = jnp.where(is_earlier_L, one_BL, other_BL)
      one_BLV, mixed_BLV = jax.lax.map(logits, jnp.stack([one_BL, mixed_BL]))  # compiles the model once
      changes_BLV = jnp.where(is_earlier_L[:, None], jnp.abs(one_BLV - mixed_BLV), 0)
      # A maximum may lose NaN: on CPUs, XLA's does so from some sizes on.
      return jnp.where(jnp.isfinite(changes_BLV).all(), changes_BLV.max(), jnp.inf)

    return jax.lax.map(change, jnp.arange(_TRIALS)).max()

  # It runs once, so compiling is what takes time: one program, in a hurry.
  hurry = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
  change = float(jax.jit(measure, compiler_options=hurry)())
  if not math.isfinite(change):
    raise InputError("its logits are not finite")
  return change


def _model_config(moe: MoEConfig, ffn: Spec, drops: bool) -> ModelConfig:
  """A model of one layer that may leak."""
  dispatcher = "sorted" if drops else "dropless"
  moe = dataclasses.replace(moe, dispatcher=dispatcher, **SMALL_EXPERTS)
  config = ModelConfig(ffn=ffn, moe=moe, **SMALL)
  (block,) = different_blocks(resolve(config))
  name = deciding_method(block)[1].partition(":")[0]
  return dataclasses.replace(config, moe=dataclasses.replace(moe, accept_leaks=name))


_ORDER = {"mixer": "0", "mixer_residual": "1", "ffn": "2", "ffn_residual": "3", "router": "", "experts": ""}


def _with_noise(params: PyTree, rng: np.random.Generator) -> PyTree:
  """Parameters that start at zero, or small, would route all tokens alike and show nothing.

  Draws are in the order of the parameters' names in the forward pass, so they, and the measured numbers with them, do
  not depend on which module of a layer holds a parameter.
  """
  flat = dict(nnx.to_flat_state(params))
  place = lambda path: [_ORDER.get(part, str(part)) for part in path if _ORDER.get(part, part)]
  for path in sorted(flat, key=place):
    value = flat[path].get_value()
    if jnp.issubdtype(value.dtype, jnp.floating):
      noise = jnp.asarray(0.5 * rng.standard_normal(value.shape), value.dtype)
      flat[path] = flat[path].replace(value + noise)
  return nnx.from_flat_state(flat)
