"""What is known of the routers of a model after it has read a text."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.analysis.examine.sums import Sizes, Sums, experts_of_layers, sums_of_batch
from moe_jax.data import Batch
from moe_jax.errors import InputError
from moe_jax.nn.transformer import Transformer
from moe_jax.ops import stats
from moe_jax.ops.dispatch import expert_capacity

SUPER = 2.0  # an expert is used too much above so many times the fair share
FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)  # capacity factors of the table of drops
MAX_NAMED = 1024  # the most frequent token ids, which are counted by themselves


@dataclasses.dataclass(frozen=True)
class Examination:
  """Sums over a text, and what they say. Arrays have an axis R of the layers with experts, in order."""

  sums: Sums  # numpy; per_sequence_RBE of all sequences
  sizes: Sizes
  num_tokens_B: np.ndarray  # of each sequence
  named_ids: np.ndarray  # token ids in the order of `by_token_RXE`
  named_counts: np.ndarray  # how often each of them occurs
  domains: tuple[str, ...]

  @property
  def load_RE(self) -> np.ndarray:
    """Tokens that are sent to each expert, before capacity; 0 beyond the experts of a layer."""
    return self.sums.by_domain_RSE.sum(axis=1)

  def of_layer(self, layer: int, array: np.ndarray) -> np.ndarray:
    """Returns the part of an array [..., E] that a layer has experts for."""
    return array[layer][..., : self.sizes.num_experts[layer]]

  def rows(self) -> list[dict[str, Any]]:
    """Returns a line of numbers for each layer."""
    return [self._row(layer) for layer in range(len(self.sizes.num_experts))]

  def _row(self, layer: int) -> dict[str, Any]:
    num_experts, load_E = self.sizes.num_experts[layer], jnp.asarray(self.of_layer(layer, self.load_RE))
    relative_E = np.asarray(stats.load(load_E)) * num_experts
    of = lambda name: jnp.asarray(self.of_layer(layer, getattr(self.sums, name)))
    information = lambda counts: float(stats.mutual_information(counts))
    reached_X = self.sums.reached_RX[layer]
    row = {
      "layer": layer,
      "num_experts": num_experts,
      "experts_per_token": float(load_E.sum() / max(self.sums.tokens, 1)),
      "max_vio": float(stats.max_vio(load_E)),
      "load_entropy": float(stats.load_entropy(load_E)),
      "router_entropy": float(self.sums.entropy_R[layer] / max(self.sums.tokens, 1)),
      "dead_experts": int(stats.dead_experts(load_E)),
      "super_experts": int((relative_E > SUPER).sum()),
      "information_domain": information(of("by_domain_RSE")),
      "information_token": information(of("by_token_RXE")),
      "information_position": information(of("by_position_RXE")),
      "devices_per_token": float(reached_X @ np.arange(len(reached_X)) / max(reached_X.sum(), 1)),
    }
    return row | {f"dropped_at_{factor:g}": self.dropped(layer, factor) for factor in FACTORS}

  def dropped(self, layer: int, factor: float) -> float:
    """Returns the share of assignments that a capacity factor would drop, if each sequence were a routing group.

    A capacity is ceil(T K factor / E) with K the mean number of experts of a token, and T the tokens of a window.
    """
    counts_BE = self.of_layer(layer, self.sums.per_sequence_RBE)
    k = Fraction(counts_BE.sum() / max(self.num_tokens_B.sum(), 1)).limit_denominator(1000)
    capacity = expert_capacity(int(self.num_tokens_B.max()), k, factor, self.sizes.num_experts[layer])
    return float(np.maximum(counts_BE - capacity, 0).sum() / max(counts_BE.sum(), 1))

  def expected_devices(self, layer: int) -> float:
    """Returns the devices that a token would reach if its experts were drawn at random."""
    num_experts, devices = self.sizes.num_experts[layer], self.sizes.num_devices
    k, own = round(self._row(layer)["experts_per_token"]), num_experts // devices
    if num_experts % devices:
      return math.nan
    none = math.comb(num_experts - own, k) / math.comb(num_experts, k)
    return devices * (1 - none)


def examine(
  model: Transformer,
  batches: Iterable[Batch],
  domains: Sequence[str],
  num_devices: int,
  see: Callable[[Batch, np.ndarray], None] | None = None,
) -> Examination:
  """Reads batches and returns what the routers did with them.

  Args:
    model: with at least one layer with routed experts.
    batches: tokens_BL, mask_BL, domain_B, all of one shape.
    domains: the names that `domain_B` indexes.
    num_devices: over which the experts of a layer would be spread.
    see: called with every batch and its router logits [R, B, L, E].

  Raises:
    InputError: if the model has no routed experts, or there is no batch.
  """
  batches = list(batches)
  what = prepare(model, batches, domains, num_devices)
  graphdef, state = nnx.split(model)
  total: Sums | None = None
  sequences: list[np.ndarray] = []
  for batch in batches:
    sums, logits_RBLE = sums_of_batch(graphdef, state, batch, what.place_V, what.sizes)
    sums = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(sums))
    sequences.append(sums.per_sequence_RBE)
    total = sums if total is None else jax.tree.map(np.add, total, sums)
    if see is not None:
      see(batch, logits_RBLE)
  return what.finish(total._replace(per_sequence_RBE=np.concatenate(sequences, axis=1)))


class Prepared(NamedTuple):
  """What is known of an examination before the model reads anything."""

  sizes: Sizes
  place_V: np.ndarray  # where each token id is counted, see `sums_of_batch`
  num_tokens_B: np.ndarray
  named_ids: np.ndarray
  named_counts: np.ndarray
  domains: tuple[str, ...]

  def finish(self, sums: Sums) -> Examination:
    return Examination(sums, self.sizes, self.num_tokens_B, self.named_ids, self.named_counts, self.domains)


def prepare(
  model: Transformer, batches: Sequence[Batch], domains: Sequence[str], num_devices: int
) -> Prepared:
  """Counts the tokens of a text. The model may be abstract. See `examine` for arguments and errors."""
  num_experts = experts_of_layers(model)
  if not num_experts:
    raise InputError("examine: the model has no layer with routed experts")
  if not batches:
    raise InputError("examine: the data set has no text")
  vocab_size = model.embedding_VD.get_value().shape[0]
  named, counts = _most_frequent(batches, vocab_size)
  place_V = np.full(vocab_size, len(named), np.int32)
  place_V[named] = np.arange(len(named))
  sizes = Sizes(len(domains), num_devices, len(named), num_experts)
  num_tokens_B = np.concatenate([batch["mask_BL"].sum(axis=1) for batch in batches])
  return Prepared(sizes, place_V, num_tokens_B, named, counts, tuple(domains))


def _most_frequent(batches: Sequence[Batch], vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the most frequent token ids, the first most frequent, and their counts."""
  counts_V = np.zeros(vocab_size, np.int64)
  for batch in batches:
    counts_V += np.bincount(batch["tokens_BL"][batch["mask_BL"]], minlength=vocab_size)
  order = np.argsort(-counts_V, kind="stable")[:MAX_NAMED]
  named = order[counts_V[order] > 0]
  return named, counts_V[named]
