"""The record of everything that the parts of a model read besides activations."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.errors import InputError
from moe_jax.types import Array, StepStats

# Folded into the key of a sequence. Jitter folds in 0, and routing groups fold in 1, 2, ...
_BITS = np.uint32(2**32 - 1)


class Past(NamedTuple):
  """Where new tokens stand behind those of a cache. A mixer reads it from `Context.past`.

  A column is a position in the batch. Sequences of different lengths end together: sequence b starts in column
  `pad_B[b]`, and its positions count from there.
  """

  start: Array  # int32 [], the columns that the cache already holds
  pad_B: Array  # int32, columns of padding before each sequence
  fresh: bool = False  # static: the cache is empty, so the new tokens need nothing of it

  def columns(self, length: int) -> Array:
    """Returns the columns of `length` new tokens, int32 [L]."""
    return self.start + jnp.arange(length, dtype=jnp.int32)

  def positions(self, length: int) -> Array:
    """Returns their positions in the sequences, int32 [B, L]. Padding has those below 0."""
    return self.columns(length)[None, :] - self.pad_B[:, None]

  def mask(self, length: int) -> Array:
    """Returns which of them are no padding, bool [B, L]."""
    return self.positions(length) >= 0


class Context(NamedTuple):
  """One micro-batch, as every part of a model sees it.

  All fields have safe defaults: `Context()` is an evaluation of text without padding. Random keys belong to
  sequences, so draws do not depend on how the batch is cut into micro-batches or spread over devices.
  """

  # bool, False: padding, which follows the text. It is sent nowhere and is not counted.
  mask_BL: Array | None = None
  key_B: Array | None = None  # a random key per sequence; None: nothing is drawn
  # a random key of the optimizer step, the same in all its micro-batches
  step_key: Array | None = None
  token_id_BL: Array | None = None  # int32, vocabulary ids
  domain_B: Array | None = None  # int32, the domain of each sequence
  # int32, in packed rows: the number of the text that a token is of, rising along the row. Mixers do not look into another text.
  segment_BL: Array | None = None
  num_domains: int = 1  # S, static
  # Statistics of the balancer: `whole` of the whole optimizer step, `so_far` of the micro-batches before this
  # one. If it is None, or a field is, this batch is the whole step. A model takes those of all its layers.
  step_stats: StepStats | None = None
  # The choices that routers take instead of their own, ones [X, B, L, E] for each of X blocks (dense ones have zeros), and
  # those of one layer. `moe_jax.adapt.replay` records them.
  routes_XBLE: Array | None = None
  routes_BLE: Array | None = None
  layer: Array | int = 0  # the number of the block in the model, from 0
  past: Past | None = None  # where the tokens stand behind those of a cache; None: there is no cache
  train: bool = False  # static: draws, and uses `capacity_factor` instead of `eval_capacity_factor`
  record_scores: bool = False  # static: attention returns a `MixerAux`
  record_logits: bool = False  # static: fill in `MoEAux.logits_BLE` and `MoEAux.selected_BLE`

  @classmethod
  def of_batch(cls, batch: Mapping[str, Array], **fields: Any) -> "Context":
    """Returns the context of a batch of `moe_jax.data`, with other fields."""
    found = {name: batch.get(name) for name in ("mask_BL", "domain_B", "segment_BL")}
    return cls(**found, **fields)

  def mask_of(self, x_BLX: Array) -> Array:
    """Returns the mask [B, L], all True if there is none."""
    return jnp.ones(x_BLX.shape[:-1], bool) if self.mask_BL is None else self.mask_BL

  def check_shapes(self, batch: int, length: int) -> None:
    """Raises `InputError` if a field is not of B sequences of L tokens. A mask [L, B] would be read as another one."""
    fields = {"mask_BL": (batch, length), "token_id_BL": (batch, length), "segment_BL": (batch, length)}
    for name, wanted in (fields | {"domain_B": (batch,)}).items():
      value = getattr(self, name)
      if value is not None and jnp.shape(value) != wanted:
        now, axes = list(jnp.shape(value)), ", ".join(name.rpartition("_")[2])
        raise InputError(f"context: {name} has the shape {now}; it must be [{axes}] = {list(wanted)}")
    self._check_domains()

  def _check_domains(self) -> None:
    """Raises `InputError` if a domain is none of S. Where its number cannot be read, `domain_one_hot` is NaN."""
    domain_B = self.domain_B
    if isinstance(domain_B, jax.core.Tracer) or (
      isinstance(domain_B, jax.Array) and not domain_B.is_fully_addressable
    ):
      return
    for domain in () if domain_B is None else np.asarray(domain_B).tolist():
      if not 0 <= domain < self.num_domains:
        raise InputError(
          f"context: domain_B has {domain}, and num_domains is {self.num_domains}; give the number of domains, which count from 0"
        )

  def domain_one_hot(self, mask_BL: Array) -> Array:
    """Returns the domains as one-hot vectors [B, S], float32. There is one domain if none are known."""
    if self.domain_B is None:
      return jnp.ones((mask_BL.shape[0], 1), jnp.float32)
    known_B1 = ((self.domain_B >= 0) & (self.domain_B < self.num_domains))[:, None]
    one_hot_BS = jax.nn.one_hot(self.domain_B, self.num_domains, dtype=jnp.float32)
    return jnp.where(known_B1, one_hot_BS, jnp.nan)  # zeros would leave out a sequence without a word

  @property
  def drawing_key(self) -> Array | None:
    """The key of the step, in training and if sequences have keys. Otherwise None: experts draw nothing."""
    return self.step_key if self.train and self.key_B is not None else None

  def random_bits(self, *shape: int) -> Array:
    """Returns random uint32 [B, *shape], drawn from the keys of the sequences."""
    draw = lambda key: jax.random.bits(jax.random.fold_in(key, _BITS), shape, jnp.uint32)
    return jax.vmap(draw)(self.key_B)

  def of_layer(self, layer: Array | int, step_stats: StepStats | None) -> "Context":
    """Returns the context of one layer, with keys of its own and the statistics of its balancer."""
    fold = lambda key: jax.random.fold_in(key, layer)
    return self._replace(
      key_B=None if self.key_B is None else jax.vmap(fold)(self.key_B),
      step_key=None if self.step_key is None else fold(self.step_key),
      step_stats=step_stats,
      routes_XBLE=None,
      routes_BLE=None if self.routes_XBLE is None else jnp.asarray(self.routes_XBLE)[layer],
      layer=layer,
    )


DEFAULT = Context()
