"""What the parts of a model are told besides the activations."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.types import Array, StepStats

_BITS = np.uint32(
  2**32 - 1
)  # far from what jitter (0) and routing groups (1, 2, ...) fold into a sequence's key


class Context(NamedTuple):
  """One micro-batch as every part of a model sees it. All fields have safe defaults: `Context()` is an evaluation of
  text without padding.

  Keys belong to sequences, so cutting the batch into micro-batches or over devices changes no draw.
  """

  mask_BL: Array | None = (
    None  # bool, False: padding, behind the text; it is routed nowhere and counts nowhere
  )
  key_B: Array | None = None  # a random key per sequence; None: nothing is drawn
  step_key: Array | None = (
    None  # one random key for the whole optimizer step, the same in all its micro-batches
  )
  token_id_BL: Array | None = None  # int32, vocabulary ids
  domain_B: Array | None = None  # int32, the domain of each sequence
  num_domains: int = 1  # S, static
  # `whole`, the balancer's statistics of the whole optimizer step, and `so_far`, those of the micro-batches before
  # this one. None, as a whole or as a field: this batch is all there is. A model takes one of each per layer.
  step_stats: StepStats | None = None
  train: bool = False  # static: draws, and uses `capacity_factor` instead of `eval_capacity_factor`
  record_logits: bool = False  # static: fill in `MoEAux.logits_BLE` and `MoEAux.selected_BLE`

  def mask_of(self, x_BLX: Array) -> Array:
    return jnp.ones(x_BLX.shape[:-1], bool) if self.mask_BL is None else self.mask_BL

  def domain_one_hot(self, mask_BL: Array) -> Array:
    """[B, S] float32; one domain where none are known."""
    if self.domain_B is None:
      return jnp.ones((mask_BL.shape[0], 1), jnp.float32)
    return jax.nn.one_hot(self.domain_B, self.num_domains, dtype=jnp.float32)

  @property
  def drawing_key(self) -> Array | None:
    """The step's key where experts may draw: in training, and where the sequences have keys, too."""
    return self.step_key if self.train and self.key_B is not None else None

  def random_bits(self, *shape: int) -> Array:
    """[B, *shape] uint32 that follow from the sequences' keys."""
    draw = lambda key: jax.random.bits(jax.random.fold_in(key, _BITS), shape, jnp.uint32)
    return jax.vmap(draw)(self.key_B)

  def of_layer(self, layer: Array | int, step_stats: StepStats | None) -> "Context":
    """What the layer of that number is told: keys of its own, and the statistics of its balancer."""
    fold = lambda key: jax.random.fold_in(key, layer)
    return self._replace(
      key_B=None if self.key_B is None else jax.vmap(fold)(self.key_B),
      step_key=None if self.step_key is None else fold(self.step_key),
      step_stats=step_stats,
    )


DEFAULT = Context()
