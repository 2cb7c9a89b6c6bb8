"""The language model: embedding, segments of blocks, norm, and output matrix."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config import ModelConfig
from moe_jax.nn.block import BlockAux
from moe_jax.nn.build import make_blocks, resolve
from moe_jax.nn.cache import Cache
from moe_jax.nn.context import DEFAULT, Context, Past
from moe_jax.nn.leaks import check_causal
from moe_jax.nn.norm import RMSNorm
from moe_jax.nn.stack import SegmentStack
from moe_jax.nn.variables import matrix, weight
from moe_jax.sharding import constrain
from moe_jax.types import Array, PyTree, StepStats

ModelAux = tuple[tuple[BlockAux, ...], ...]  # per segment and block of its pattern, stacked over repetitions


class Transformer(nnx.Module):
  """A language model from token ids to logits: `logits_BLV, aux = model(tokens_BL, context)`.

  Args:
    config: the model. Names in it are resolved here.
    vocab_size: V.
    rngs: draws the parameters.

  Raises:
    InputError: if a field is wrong, or if the model is causal and a router looks at later tokens, unless
      `accept_leaks` names it.
  """

  def __init__(self, config: ModelConfig, vocab_size: int, *, rngs: nnx.Rngs):
    self.config = config = resolve(config)
    check_causal(config)
    d = config.model_dim
    embedding = 0.02 * jax.random.normal(rngs.params(), (vocab_size, d), jnp.float32)
    self.embedding_VD = nnx.Param(embedding, logical_axes=("vocab", "embed"))
    self.segments = nnx.List(self._stacks(rngs))
    self.final_norm = RMSNorm(d, config.norm_eps)
    tied = config.tie_embeddings
    self.w_head_DV = None if tied else matrix(rngs, (d, vocab_size), ("embed", "vocab"), config.init_scale)

  def _stacks(self, rngs: nnx.Rngs) -> Iterator[SegmentStack]:
    config, first_layer = self.config, 0
    for segment in config.blocks:
      stack = SegmentStack(
        lambda rngs, segment=segment: make_blocks(config, segment, rngs),
        segment.repeats,
        first_layer=first_layer,
        scan=config.scan_layers,
        remat=config.remat,
        rngs=rngs,
      )
      first_layer += stack.num_layers
      yield stack

  def __call__(self, tokens_BL: Array, context: Context = DEFAULT) -> tuple[Array, ModelAux]:
    """Returns logits [B, L, V] in float32, and the aux of each block.

    Args:
      tokens_BL: int32 token ids.
      context: mask, keys and other inputs of the batch. The trees in its `step_stats`, if given, have the
        structure that `balancer_stats` returns for the aux of this method.
    """
    context = context._replace(token_id_BL=tokens_BL, mask_BL=context.mask_of(tokens_BL[..., None]))
    x_BLD = self._embedded(tokens_BL)
    auxes = []
    for i, segment in enumerate(self.segments):
      stats = tuple(_stats_of(context.step_stats, i, j) for j in range(len(segment.pattern.blocks)))
      x_BLD, aux = segment(x_BLD, context, stats)
      auxes.append(aux)
    return self._logits(x_BLD), tuple(auxes)

  def init_cache(self, pad_B: Array, length: int) -> Cache:
    """Returns an empty cache for sequences of up to `length` columns, in the compute dtype.

    Args:
      pad_B: int32, columns of padding before each sequence.
      length: columns, padding included.

    Raises:
      InputError: if a mixer keeps no cache.
    """
    dtype = jnp.dtype(self.config.compute_dtype)
    layers = tuple(segment.init_cache(len(pad_B), length, dtype) for segment in self.segments)
    return Cache(jnp.zeros((), jnp.int32), pad_B, layers)

  def prefill(self, tokens_BL: Array, pad_B: Array, length: int) -> tuple[Array, Cache]:
    """Reads the beginning of a batch of sequences.

    Args:
      tokens_BL: int32 token ids. Sequences end together: sequence b begins in column `pad_B[b]`.
      pad_B: int32, columns of padding before each sequence.
      length: the columns that the cache can hold, L and those that follow.

    Returns:
      (logits of the last column, float32 [B, 1, V], the cache).
    """
    cache = self.init_cache(pad_B, length)
    x_BLD, cache = self._extended(tokens_BL, cache, fresh=True)
    return self._logits(x_BLD[:, -1:]), cache

  def extend(self, tokens_BL: Array, cache: Cache) -> tuple[Array, Cache]:
    """Reads tokens behind those of a cache. Nobody checks here whether the cache has room for them.

    Returns:
      (logits [B, L, V] in float32, the cache).
    """
    x_BLD, cache = self._extended(tokens_BL, cache, fresh=False)
    return self._logits(x_BLD), cache

  def _extended(self, tokens_BL: Array, cache: Cache, fresh: bool) -> tuple[Array, Cache]:
    past, length = Past(cache.start, cache.pad_B, fresh), tokens_BL.shape[1]
    context = Context(past.mask(length), token_id_BL=tokens_BL, past=past)
    x_BLD, layers = self._embedded(tokens_BL), []
    for segment, caches in zip(self.segments, cache.layers, strict=True):
      x_BLD, caches = segment.extend(x_BLD, context, caches)
      layers.append(caches)
    return x_BLD, Cache(cache.start + length, cache.pad_B, tuple(layers))

  def _embedded(self, tokens_BL: Array) -> Array:
    embedding_VD = weight(self.embedding_VD, jnp.dtype(self.config.compute_dtype))
    return constrain(embedding_VD[tokens_BL], ("batch", None, None))

  def _logits(self, x_BLD: Array) -> Array:
    dtype = x_BLD.dtype
    x_BLD = self.final_norm(x_BLD)
    tied = self.w_head_DV is None
    head_DV = weight(self.embedding_VD, dtype).T if tied else weight(self.w_head_DV, dtype)
    return jnp.einsum("BLD,DV->BLV", x_BLD, head_DV, preferred_element_type=jnp.float32)


def balancer_stats(aux: ModelAux) -> PyTree:
  """Returns what the balancers of a model observed, in the structure that `Context.step_stats` expects."""
  of_block = lambda block: None if block.ffn is None else block.ffn.balancer_stats
  return tuple(tuple(of_block(block) for block in segment) for segment in aux)


def _stats_of(step_stats: StepStats | None, segment: int, block: int) -> StepStats | None:
  if step_stats is None:
    return None
  pick = lambda stats: None if stats is None else stats[segment][block]
  return StepStats(pick(step_stats.whole), pick(step_stats.so_far))
