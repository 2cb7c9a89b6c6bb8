"""The language model: embedding, segments of blocks, norm, and output matrix."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config import ModelConfig, Segment
from moe_jax.errors import InputError
from moe_jax.nn.block import BlockAux
from moe_jax.nn.build import make_blocks, resolve
from moe_jax.nn.cache import Cache
from moe_jax.nn.context import DEFAULT, Context, Past
from moe_jax.nn.leaks import check_causal
from moe_jax.nn.mtp import Successor, ahead
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
    # A name behind `segments`: `update_balancers` walks the layers in the order in which aux has them.
    self.successors = nnx.List(self._successors(rngs))

  def _stacks(self, rngs: nnx.Rngs) -> Iterator[SegmentStack]:
    first_layer = 0
    for segment in self.config.blocks:
      stack = self._stack(segment, first_layer, rngs)
      first_layer += stack.num_layers
      yield stack

  def _stack(self, segment: Segment, first_layer: int, rngs: nnx.Rngs) -> SegmentStack:
    return SegmentStack(
      lambda rngs: make_blocks(self.config, segment, rngs),
      segment.repeats,
      first_layer=first_layer,
      scan=self.config.scan_layers,
      remat=self.config.remat,
      rngs=rngs,
    )

  def _successors(self, rngs: nnx.Rngs) -> Iterator[Successor]:
    config = self.config
    layers = sum(stack.num_layers for stack in self.segments)
    for i in range(config.mtp_depth):
      stack = self._stack(Segment((config.last_block,)), layers + i, rngs)
      sizes = {"norm_eps": config.norm_eps, "init_scale": config.init_scale}
      yield Successor(config.model_dim, stack, **sizes, rngs=rngs)

  def __call__(self, tokens_BL: Array, context: Context = DEFAULT) -> tuple[Array, ModelAux]:
    """Returns logits [B, L, V] in float32, and the aux of each block.

    Args:
      tokens_BL: int32 token ids.
      context: mask, keys and other inputs of the batch. The trees in its `step_stats`, if given, have the
        structure that `balancer_stats` returns for the aux of this method.
    """
    x_BLD, aux = self._hidden(tokens_BL, context)
    return self._head(x_BLD), aux

  def predict_ahead(
    self, tokens_BL: Array, next_BL: Array, context: Context = DEFAULT
  ) -> tuple[tuple[Array, ...], ModelAux]:
    """Returns the logits of the next token, and those of each module of multi-token prediction.

    The logits of module k, from 1 on, are for the token k behind the next one. It routes the tokens for which there
    is one, so `ahead(mask_BL, k)` says which of them count.

    Args:
      tokens_BL: int32 token ids.
      next_BL: the token behind each of them. Where the mask is False, it does not matter.
      context: as in a call, with statistics for the modules, too.

    Returns:
      1 + mtp_depth arrays of logits, float32 [B, L, V], and the aux of the model with an entry for each module.
    """
    if context.segment_BL is not None:
      raise InputError(
        "objective next_tokens: looks from one text of a packed row into the next; use --pack_examples=false"
      )
    mask_BL = context.mask_of(tokens_BL[..., None])
    x_BLD, aux = self._hidden(tokens_BL, context)
    logits, auxes = [self._head(x_BLD)], list(aux)
    for k, successor in enumerate(self.successors, start=1):
      ids_BL = ahead(next_BL, k - 1)
      own = context._replace(token_id_BL=ids_BL, mask_BL=ahead(mask_BL, k))
      stats = (_stats_of(context.step_stats, len(self.segments) + k - 1, 0),)
      x_BLD, aux = successor(x_BLD, self._embedded(ids_BL), own, stats)
      logits.append(self._head(x_BLD))
      auxes.append(aux)
    return tuple(logits), tuple(auxes)

  def _hidden(self, tokens_BL: Array, context: Context) -> tuple[Array, ModelAux]:
    """Returns x_BLD behind the last norm, and the aux of each block."""
    context = context._replace(token_id_BL=tokens_BL, mask_BL=context.mask_of(tokens_BL[..., None]))
    context.check_shapes(*tokens_BL.shape)
    x_BLD = self._embedded(tokens_BL)
    auxes = []
    for i, segment in enumerate(self.segments):
      stats = tuple(_stats_of(context.step_stats, i, j) for j in range(len(segment.pattern.blocks)))
      x_BLD, aux = segment(x_BLD, context, stats)
      auxes.append(aux)
    return self.final_norm(x_BLD), tuple(auxes)

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
    # Rounded behind the lookup: the gradient of a row is a sum over its tokens, and a sum of ones in bfloat16 ends at 256.
    x_BLD = weight(self.embedding_VD)[tokens_BL].astype(self.config.compute_dtype)
    return constrain(x_BLD, ("batch", None, None))

  def _logits(self, x_BLD: Array) -> Array:
    return self._head(self.final_norm(x_BLD))

  def _head(self, x_BLD: Array) -> Array:
    """Returns the logits of what is behind the last norm."""
    dtype = x_BLD.dtype
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
