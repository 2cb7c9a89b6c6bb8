"""`moe_jax.account`: what a model has, costs and stores."""

import dataclasses
import math
import pathlib
from typing import Any, NamedTuple

import jax
from flax import nnx

from moe_jax.analysis.accounting import storage
from moe_jax.analysis.accounting.parameters import Active, Parameters, count, count_modules
from moe_jax.analysis.flops import ModelFlops, forward_flops
from moe_jax.config import Config, ModelConfig
from moe_jax.errors import InputError
from moe_jax.interop.load import read_model_config
from moe_jax.models import PRESETS, VOCAB_SIZES, preset
from moe_jax.nn.build import resolve, routed_part
from moe_jax.nn.cache import CacheBytes, cache_bytes
from moe_jax.nn.transformer import Transformer

SEQUENCE_LENGTH = 4096  # of the operations and the cache, if none is given


class RoutedLayers(NamedTuple):
  """Layers of a model that have equally many experts."""

  layers: int
  num_experts: int  # E, without shared experts
  num_experts_per_token: int  # K

  @property
  def sparsity(self) -> float:
    """E / K."""
    return self.num_experts / self.num_experts_per_token

  @property
  def combinations(self) -> int:
    """The number of sets of K experts."""
    return math.comb(self.num_experts, self.num_experts_per_token)


@dataclasses.dataclass(frozen=True)
class Account:
  """What `account` found. Operations are of one token, a multiplication and an addition being 2."""

  name: str
  vocab_size: int
  sequence_length: int  # L
  parameters: Parameters
  active: Active  # with K experts
  active_at_most: Active  # with the most that routers may choose
  mtp: int  # parameters of modules of multi-token prediction, which nothing else here counts
  routed: tuple[RoutedLayers, ...]
  forward: ModelFlops  # the mean over the tokens of a sequence
  training_flops: float  # forward and backward, nothing recomputed
  decoding_flops: float  # of a token behind L - 1 others
  weight_bytes: dict[str, int]  # by type
  optimizer_bytes: dict[str, int]  # by optimizer, beside the float32 parameters
  cache: CacheBytes | None  # of one sequence, in bfloat16; None: a mixer keeps none

  def to_dict(self) -> dict[str, Any]:
    """Returns JSON values."""
    parts = {name: getattr(self, name) for name in ("name", "vocab_size", "sequence_length")}
    parts["parameters"] = {"total": self.parameters.total, **self.parameters._asdict()}
    parts["active"] = self.active._asdict()
    parts["active_at_most"] = self.active_at_most._asdict()
    parts["mtp"] = self.mtp
    parts["routed"] = [
      row._asdict() | {"sparsity": row.sparsity, "combinations": row.combinations} for row in self.routed
    ]
    flops = {
      "prefill": self.forward.forward,
      "training": self.training_flops,
      "decoding": self.decoding_flops,
    }
    parts["flops"] = flops | {"prefill_parts": self.forward._asdict()}
    return parts | {
      "weight_bytes": self.weight_bytes,
      "optimizer_bytes": self.optimizer_bytes,
      "cache_bytes": self.cache and self.cache._asdict(),
    }


def account(
  model: str | Config | ModelConfig | Transformer, vocab_size: int = 0, sequence_length: int = SEQUENCE_LENGTH
) -> Account:
  """Counts parameters, operations and bytes. Nothing is allocated, so any size takes a moment.

  Args:
    model: the name of a preset, the folder of a published checkpoint or of a run, of which only config.json is read, a
      configuration, or a model, which may be abstract.
    vocab_size: V; 0: that of the preset, the folder or the model. A configuration has none.
    sequence_length: L, the length at which operations and caches are counted.

  Raises:
    InputError: if a name is unknown, a field is wrong, or V is not known.
  """
  name, config = "model", model
  if isinstance(model, str):
    name = model
    config, own_vocab_size = _named(model)
    vocab_size = vocab_size or own_vocab_size
  if isinstance(model, Transformer):
    config, vocab_size = model.config, model.embedding_VD.get_value().shape[0]
  config = config.model if isinstance(config, Config) else config
  if vocab_size < 1 or sequence_length < 1:
    raise InputError(
      f"account: vocab_size={vocab_size}, sequence_length={sequence_length}: both must be positive, and a "
      "configuration does not say its vocabulary"
    )
  if max(vocab_size, sequence_length) >= 2**31:
    raise InputError(
      f"account: vocab_size={vocab_size}, sequence_length={sequence_length}: both must be below 2^31"
    )
  config = resolve(config)
  built = model if isinstance(model, Transformer) else _abstract(config, vocab_size)
  counted = count(built)
  forward = forward_flops(config, vocab_size, sequence_length)
  return Account(
    name=name,
    vocab_size=vocab_size,
    sequence_length=sequence_length,
    parameters=counted.parameters,
    active=counted.active,
    active_at_most=counted.active_at_most,
    mtp=count_modules(built),
    routed=_routed(config),
    forward=forward,
    training_flops=3 * forward.forward,
    decoding_flops=forward_flops(config, vocab_size, sequence_length, decoding=True).forward,
    cache=_cache(config, sequence_length),
    weight_bytes=storage.weight_bytes(built),
    optimizer_bytes=storage.optimizer_bytes(built),
  )


def _named(name: str) -> tuple[Config, int]:
  """Returns the configuration and V of a preset, or of a folder, which is what has a slash or exists."""
  if name not in PRESETS and ("/" in name or pathlib.Path(name).is_dir()):
    return read_model_config(name)
  return preset(name), VOCAB_SIZES[name]


def _abstract(config: ModelConfig, vocab_size: int) -> Transformer:
  return nnx.eval_shape(lambda: Transformer(config, vocab_size, rngs=nnx.Rngs(jax.random.key(0))))


def _cache(config: ModelConfig, length: int) -> CacheBytes | None:
  try:
    return cache_bytes(config, length)
  except InputError:
    return None


def _routed(config: ModelConfig) -> tuple[RoutedLayers, ...]:
  layers: dict[tuple[int, int], int] = {}
  for segment in config.blocks:
    for layer in filter(None, map(routed_part, segment.pattern)):
      key = (layer.num_experts, layer.num_experts_per_token)
      layers[key] = layers.get(key, 0) + segment.repeats
  return tuple(RoutedLayers(count, *key) for key, count in layers.items())
