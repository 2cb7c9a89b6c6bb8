"""A decoder language model with MoE layers.

Layers with experts repeat in periods: `moe_every - 1` dense layers and one with experts. The parameters
of all periods are stacked on a leading axis whether the forward pass scans over them or is unrolled, so
the choice changes the compiled program and nothing else.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.nn.attention import Attention
from moe_jax.nn.methods import check_causal
from moe_jax.nn.mlp import MLP
from moe_jax.nn.moe import MoE
from moe_jax.nn.norm import RMSNorm
from moe_jax.nn.soft_moe import SoftMoE, soft_moe
from moe_jax.nn.variables import matrix, weight
from moe_jax.ops.dispatch.common import EXCHANGED
from moe_jax.registry import build
from moe_jax.sharding import constrain
from moe_jax.types import Array, MoEAux, StepStats


def moe(config: MoEConfig, dim: int, init_scale: float, rngs: nnx.Rngs) -> MoE:
  """The layer that routes tokens to experts."""
  return MoE(config, dim, init_scale, rngs=rngs)


# name -> (config, dim, init_scale, rngs, options) -> layer. Each is called as `MoE` is; `nn.methods.LAYER_KINDS`
# says what is to be known of it before.
LAYERS = {"moe": moe, "soft_moe": soft_moe}


def make_layer(config: ModelConfig, rngs: nnx.Rngs) -> MoE | SoftMoE:
  """The layer with experts that `config.moe.layer` names."""
  return build("layer", LAYERS, config.moe.layer, config.moe, config.model_dim, config.init_scale, rngs)


class DenseLayer(nnx.Module):
  """Pre-norm attention and a dense feed-forward block."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.attention_norm = RMSNorm(config.model_dim, config.norm_eps)
    self.attention = Attention(config, rngs=rngs)
    self.mlp_norm = RMSNorm(config.model_dim, config.norm_eps)
    self.mlp = MLP(
      config.model_dim, config.dense_dim, config.moe.expert_activation, config.init_scale, rngs=rngs
    )

  def __call__(self, x_BLD: Array) -> Array:
    x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD))
    return x_BLD + self.mlp(self.mlp_norm(x_BLD))


class MoELayer(nnx.Module):
  """Pre-norm attention and an MoE feed-forward block."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.attention_norm = RMSNorm(config.model_dim, config.norm_eps)
    self.attention = Attention(config, rngs=rngs)
    self.moe_norm = RMSNorm(config.model_dim, config.norm_eps)
    self.moe = make_layer(config, rngs)

  def __call__(self, x_BLD: Array, mask_BL: Array, **kwargs) -> tuple[Array, MoEAux]:
    x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD))
    y_BLD, aux = self.moe(self.moe_norm(x_BLD), mask_BL, **kwargs)
    return x_BLD + y_BLD, aux


class Period(nnx.Module):
  """`moe_every - 1` dense layers, then one with experts."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.dense = nnx.List([DenseLayer(config, rngs=rngs) for _ in range(config.moe_every - 1)])
    self.sparse = MoELayer(config, rngs=rngs)

  def __call__(self, x_BLD: Array, mask_BL: Array, **kwargs) -> tuple[Array, MoEAux]:
    for layer in self.dense:
      x_BLD = layer(x_BLD)
    return self.sparse(x_BLD, mask_BL, **kwargs)


def _stacked_periods(config: ModelConfig, rngs: nnx.Rngs) -> Period:
  """One `Period` whose variables hold those of all periods on a new leading axis."""
  graphdefs = []

  def build(key):
    graphdef, state = nnx.split(Period(config, rngs=nnx.Rngs(key)))
    graphdefs.append(graphdef)
    return state

  # vmap and not a loop: the initialisers are compiled once, whatever the depth
  states = jax.vmap(build)(jax.random.split(rngs.params(), config.num_moe_layers))
  return nnx.merge(graphdefs[0], states)


def _remat(body, policy: str):
  if policy == "none":
    return body
  policies = jax.checkpoint_policies
  saveable = {
    "full": None,
    "dots": policies.dots_saveable,
    "exchange": policies.save_only_these_names(EXCHANGED),
  }
  return jax.checkpoint(body, policy=saveable[policy], prevent_cse=False)


class Transformer(nnx.Module):
  """Token ids in, next-token logits out: `logits_BLV, aux = model(tokens_BL, mask_BL)`.

  Every field of `aux` has a leading axis over the R layers with experts.
  """

  def __init__(self, config: ModelConfig, vocab_size: int, *, rngs: nnx.Rngs):
    config.check()
    check_causal(config.moe)
    self.config = config
    d = config.model_dim
    embedding = 0.02 * jax.random.normal(rngs.params(), (vocab_size, d), jnp.float32)
    self.embedding_VD = nnx.Param(embedding, logical_axes=("vocab", "embed"))
    self.first = nnx.List([DenseLayer(config, rngs=rngs) for _ in range(config.num_dense_first)])
    self.periods = _stacked_periods(config, rngs)
    self.final_norm = RMSNorm(d, config.norm_eps)
    tied = config.tie_embeddings
    self.w_head_DV = None if tied else matrix(rngs, (d, vocab_size), ("embed", "vocab"), config.init_scale)

  def __call__(
    self,
    tokens_BL: Array,
    mask_BL: Array | None = None,
    *,
    key_B: Array | None = None,
    step_stats: StepStats | None = None,
    train: bool = False,
    domain_B: Array | None = None,
    record_logits: bool = False,
  ) -> tuple[Array, MoEAux]:
    """Logits [B, L, V] in float32 and what the MoE layers know.

    Args:
      tokens_BL: int32.
      mask_BL: bool, False for padding, which must come behind the text.
      key_B: a key per sequence (see `MoE`); None: no randomness.
      step_stats: see `MoE`, with a leading axis R.
      train: see `MoE`.
      domain_B: int32, the domain of each sequence, for routers by task.
      record_logits: see `MoE`.

    Raises:
      InputError: the router sees later tokens, and `accept_leaks` does not name it.
    """
    if mask_BL is None:
      mask_BL = jnp.ones(tokens_BL.shape, bool)
    dtype = jnp.dtype(self.config.compute_dtype)
    x_BLD = constrain(weight(self.embedding_VD, dtype)[tokens_BL], ("batch", None, None))
    for layer in self.first:
      x_BLD = layer(x_BLD)
    inputs = {
      "token_id_BL": tokens_BL,
      "domain_B": domain_B,
      "train": train,
      "record_logits": record_logits,
    }
    x_BLD, aux = self._run_periods(x_BLD, mask_BL, key_B, step_stats, inputs)
    x_BLD = self.final_norm(x_BLD)
    tied = self.w_head_DV is None
    head_DV = weight(self.embedding_VD, dtype).T if tied else weight(self.w_head_DV, dtype)
    logits_BLV = jnp.einsum("BLD,DV->BLV", x_BLD, head_DV, preferred_element_type=jnp.float32)
    return logits_BLV, aux

  def _run_periods(self, x_BLD, mask_BL, key_B, step_stats, inputs):
    graphdef, stacked = nnx.split(self.periods)

    def body(x_BLD, xs):
      state, layer, layer_stats = xs
      layer_key_B = None if key_B is None else jax.vmap(lambda key: jax.random.fold_in(key, layer))(key_B)
      period = nnx.merge(graphdef, state)
      return period(x_BLD, mask_BL, key_B=layer_key_B, step_stats=layer_stats, **inputs)

    body = _remat(body, self.config.remat)
    num_periods = self.config.num_moe_layers
    xs = (stacked, jnp.arange(num_periods), step_stats)
    if self.config.scan_layers:
      return jax.lax.scan(body, x_BLD, xs)
    auxes = []
    for i in range(num_periods):
      x_BLD, aux = body(x_BLD, jax.tree.map(lambda leaf, i=i: leaf[i], xs))
      auxes.append(aux)
    return x_BLD, jax.tree.map(lambda *leaves: jnp.stack(leaves), *auxes)
