"""Segments of repeated blocks. Their parameters are stacked, and the program loops over them.

Compile time depends on the number of different blocks and not on the depth.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.nn.block import Block, BlockAux
from moe_jax.nn.context import Context
from moe_jax.ops.dispatch.common import EXCHANGED
from moe_jax.types import Array, PyTree, StepStats

_POLICIES = {
  "full": None,
  "dots": jax.checkpoint_policies.dots_saveable,
  "exchange": jax.checkpoint_policies.save_only_these_names(EXCHANGED),
}


class Pattern(nnx.Module):
  """The blocks that a segment repeats."""

  def __init__(self, blocks: list[Block]):
    self.blocks = nnx.List(blocks)


class SegmentStack(nnx.Module):
  """A pattern of blocks, repeated. Every variable has a leading axis of repetitions.

  A loop over that axis and an unrolled forward pass compute the same; only the compiled program differs.

  Args:
    make: builds the blocks of one repetition.
    repeats: the number of repetitions.
    first_layer: the number of the segment's first block in the model.
    scan: whether to loop over the repetitions.
    remat: what the backward pass recomputes: full, dots (all but products), exchange (full, but no row is
      exchanged twice), or none.
    rngs: draws the parameters.
  """

  def __init__(
    self,
    make: Callable[[nnx.Rngs], list[Block]],
    repeats: int,
    *,
    first_layer: int = 0,
    scan: bool = True,
    remat: str = "none",
    rngs: nnx.Rngs,
  ):
    self.repeats, self.first_layer, self.scan, self.remat = repeats, first_layer, scan, remat
    graphdefs = []

    def build(key):
      graphdef, state = nnx.split(Pattern(make(nnx.Rngs(key))))
      graphdefs.append(graphdef)
      return state

    # vmap and not a loop: the initialisers are compiled once, whatever the depth
    states = jax.vmap(build)(jax.random.split(rngs.params(), repeats))
    self.pattern = nnx.merge(graphdefs[0], states)

  @property
  def num_layers(self) -> int:
    return self.repeats * len(self.pattern.blocks)

  def __call__(
    self, x_BLD: Array, context: Context, step_stats: tuple[StepStats | None, ...]
  ) -> tuple[Array, tuple[BlockAux, ...]]:
    """Returns x_BLD and the aux of each block of the pattern, with a leading axis of repetitions.

    Args:
      x_BLD: activations of any float dtype.
      context: of the model; each block gets keys of its own.
      step_stats: statistics for each block of the pattern, with a leading axis of repetitions, or None.
    """
    graphdef, stacked = nnx.split(self.pattern)
    size = len(self.pattern.blocks)

    def body(x_BLD, xs):
      state, repetition, stats = xs
      auxes = []
      for i, block in enumerate(nnx.merge(graphdef, state).blocks):
        layer = self.first_layer + repetition * size + i
        x_BLD, aux = block(x_BLD, context.of_layer(layer, stats[i]))
        auxes.append(aux)
      return x_BLD, tuple(auxes)

    if self.remat != "none":
      body = jax.checkpoint(body, policy=_POLICIES[self.remat], prevent_cse=False)
    xs = (stacked, jnp.arange(self.repeats), step_stats)
    if self.scan:
      return jax.lax.scan(body, x_BLD, xs)
    auxes = []
    for i in range(self.repeats):
      x_BLD, aux = body(x_BLD, jax.tree.map(lambda leaf, i=i: leaf[i], xs))
      auxes.append(aux)
    return x_BLD, jax.tree.map(lambda *leaves: jnp.stack(leaves), *auxes)

  def init_cache(self, batch_size: int, length: int, dtype: jnp.dtype) -> tuple[PyTree, ...]:
    """Returns an empty cache for each block of the pattern, with a leading axis of repetitions."""
    stacked = lambda leaf: jnp.broadcast_to(leaf[None], (self.repeats, *leaf.shape))
    caches = tuple(block.init_cache(batch_size, length, dtype) for block in self.pattern.blocks)
    return jax.tree.map(stacked, caches)

  def extend(
    self, x_BLD: Array, context: Context, caches: tuple[PyTree, ...]
  ) -> tuple[Array, tuple[PyTree, ...]]:
    """Returns x_BLD and the caches for tokens that follow those of the caches."""
    graphdef, stacked = nnx.split(self.pattern)
    size = len(self.pattern.blocks)

    def body(carry, xs):
      (x_BLD, caches), (state, repetition) = carry, xs
      own = jax.tree.map(lambda c: jax.lax.dynamic_index_in_dim(c, repetition, keepdims=False), caches)
      extended = []
      for i, block in enumerate(nnx.merge(graphdef, state).blocks):
        layer = self.first_layer + repetition * size + i
        x_BLD, cache = block.extend(x_BLD, context.of_layer(layer, None), own[i])
        extended.append(cache)
      write = lambda c, new: jax.lax.dynamic_update_index_in_dim(c, new, repetition, 0)
      return (x_BLD, jax.tree.map(write, caches, tuple(extended))), None

    # The caches are carried, and so written in place. As outputs of the loop they would be there twice.
    (x_BLD, caches), _ = jax.lax.scan(body, (x_BLD, caches), (stacked, jnp.arange(self.repeats)))
    return x_BLD, caches
