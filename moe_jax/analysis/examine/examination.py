"""What is known of the routers of a model after it has read a text."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.analysis.examine.sums import Sums, Tokens, sums_of_layer
from moe_jax.data import Batch
from moe_jax.errors import InputError
from moe_jax.interop.stream import LayerStream
from moe_jax.nn.aux import moe_auxes
from moe_jax.nn.context import Context
from moe_jax.nn.transformer import Transformer
from moe_jax.ops import stats
from moe_jax.ops.dispatch import expert_capacity
from moe_jax.types import Array, MoEAux, PyTree

SUPER = 2.0  # an expert is used too much above so many times the fair share
FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)  # capacity factors of the table of drops
MAX_NAMED = 1024  # the most frequent token ids, which are counted by themselves


@dataclasses.dataclass(frozen=True)
class Examination:
  """Sums over a text for each layer with experts, in order, and what they say.

  Attributes:
    layers: numpy; `per_sequence_BE` is of all sequences.
    num_devices: over which the experts of a layer would be spread.
    num_tokens_B: of each sequence.
    named_ids: token ids in the order of `by_token_XE`, the most frequent first.
    named_counts: how often each of them occurs.
    domains: names.
  """

  layers: tuple[Sums, ...]
  num_devices: int
  num_tokens_B: np.ndarray
  named_ids: np.ndarray
  named_counts: np.ndarray
  domains: tuple[str, ...]

  @property
  def num_tokens(self) -> int:
    """Tokens that are no padding."""
    return int(self.num_tokens_B.sum())

  def load_E(self, layer: int) -> np.ndarray:
    """Returns the assignments to each expert of a layer, before capacity."""
    return self.layers[layer].by_domain_SE.sum(axis=0)

  def rows(self) -> list[dict[str, Any]]:
    """Returns a line of numbers for each layer."""
    return [self._row(layer) for layer in range(len(self.layers))]

  def _row(self, layer: int) -> dict[str, Any]:
    sums, load_E, tokens = self.layers[layer], self.load_E(layer), max(self.num_tokens, 1)
    counts_E = jnp.asarray(load_E)
    information = lambda counts: float(stats.mutual_information(jnp.asarray(counts)))
    row = {
      "layer": layer,
      "num_experts": len(load_E),
      "experts_per_token": float(load_E.sum() / tokens),
      "max_vio": float(stats.max_vio(counts_E)),
      "load_entropy": float(stats.load_entropy(counts_E)),
      "router_entropy": float(sums.entropy / tokens),
      "dead_experts": int(stats.dead_experts(counts_E)),
      "super_experts": int((load_E > SUPER * load_E.mean()).sum()),
      "information_domain": information(sums.by_domain_SE),
      "information_token": information(sums.by_token_XE),
      "information_position": information(sums.by_position_XE),
      "devices_per_token": float(sums.reached_X @ np.arange(len(sums.reached_X)) / tokens),
      "devices_by_chance": self.expected_devices(layer),
    }
    return row | {f"dropped_at_{factor:g}": self.dropped(layer, factor) for factor in FACTORS}

  def dropped(self, layer: int, factor: float) -> float:
    """Returns the share of assignments that a capacity factor would drop, if each sequence were a routing group.

    A capacity is ceil(T K factor / E) with K the mean number of experts of a token, and T the tokens of a window.
    """
    counts_BE = self.layers[layer].per_sequence_BE
    k = Fraction(counts_BE.sum() / max(self.num_tokens, 1)).limit_denominator(1000)
    capacity = expert_capacity(int(self.num_tokens_B.max()), k, factor, counts_BE.shape[-1])
    return float(np.maximum(counts_BE - capacity, 0).sum() / max(counts_BE.sum(), 1))

  def expected_devices(self, layer: int) -> float:
    """Returns the devices that a token would reach if its experts were drawn at random; NaN if they do not divide E."""
    load_E = self.load_E(layer)
    num_experts, k = len(load_E), round(load_E.sum() / max(self.num_tokens, 1))
    if num_experts % self.num_devices:
      return math.nan
    none = math.comb(num_experts - num_experts // self.num_devices, k) / math.comb(num_experts, k)
    return self.num_devices * (1 - none)


def examine(
  model: Transformer | LayerStream,
  batches: Iterable[Batch],
  domains: Sequence[str],
  num_devices: int,
  see: Callable[[int, int, Array], None] | None = None,
) -> Examination:
  """Reads batches and returns what the routers did with them.

  Args:
    model: with at least one layer with routed experts. Of a `LayerStream`, one layer is in memory at a time.
    batches: tokens_BL, mask_BL, domain_B, all of one shape.
    domains: the names that `domain_B` indexes.
    num_devices: over which the experts of a layer would be spread.
    see: called with the number of every batch, that of every layer with experts, and its router logits [B, L, E].

  Raises:
    InputError: if the model has no routed experts, or there is no batch.
  """
  batches = list(batches)
  if not batches:
    raise InputError("examine: the data set has no text")
  found = _Collector(batches, len(domains), num_devices)

  def take(number: int, batch: int, layer: MoEAux) -> None:
    found.add(number, batch, layer)
    if see is not None:
      see(batch, number, layer.logits_BLE)

  if isinstance(model, LayerStream):
    _stream(model, found, take)
  else:
    graphdef, state = nnx.split(model)
    for i, batch in enumerate(batches):
      for number, layer in enumerate(
        _layers(_forward(graphdef, state, batch["tokens_BL"], found.context(i)))
      ):
        take(number, i, layer)
  if not found.totals:
    raise InputError("examine: the model has no layer with routed experts")
  return found.examination(domains)


@functools.partial(jax.jit, static_argnames=("graphdef",))
def _forward(graphdef: nnx.GraphDef, state: PyTree, tokens_BL: Array, arrays: tuple) -> PyTree:
  context = Context(arrays[0], domain_B=arrays[1], num_domains=arrays[2].shape[0], record_logits=True)
  return nnx.merge(graphdef, state)(tokens_BL, context)[1]


def _layers(aux: PyTree) -> list[MoEAux]:
  """Returns the aux of every layer with experts that choose tokens, in order."""
  found = []
  for blocks in map(moe_auxes, aux):
    blocks = [block for block in blocks if block.selected_BLE is not None]
    for i in range(blocks[0].kept_per_expert_E.shape[0] if blocks else 0):
      found += [jax.tree.map(lambda leaf, i=i: leaf[i], block) for block in blocks]
  return found


def _stream(model: LayerStream, found: "_Collector", take: Callable[[int, int, MoEAux], None]) -> None:
  numbers: dict[int, int] = {}  # of the layers with experts, by layer

  def see(layer: int, batch: int, aux: PyTree) -> None:
    for own in moe_auxes(aux):
      if own.selected_BLE is not None:
        take(numbers.setdefault(layer, len(numbers)), batch, own)

  contexts = []
  for i, batch in enumerate(found.batches):
    mask_BL, domain_B, domains = found.context(i)
    context = Context(mask_BL, domain_B=domain_B, num_domains=domains.shape[0], record_logits=True)
    contexts.append((jnp.asarray(batch["tokens_BL"]), context))
  model.forward(contexts, see)


class _Collector:
  """Adds up the sums of layers, whatever comes first, layers or batches."""

  def __init__(self, batches: Sequence[Batch], num_domains: int, num_devices: int):
    self.batches, self.num_domains, self.num_devices = batches, num_domains, num_devices
    self.named, self.counts = _most_frequent(batches)
    place_V = np.full(1 + max(int(batch["tokens_BL"].max()) for batch in batches), len(self.named), np.int32)
    place_V[self.named] = np.arange(len(self.named))
    self.tokens = [
      Tokens(
        jnp.asarray(batch["mask_BL"]),
        jax.nn.one_hot(batch["domain_B"], num_domains),
        jnp.asarray(place_V[batch["tokens_BL"]]),
      )
      for batch in batches
    ]
    self.totals: list[Sums] = []
    self._sequences: list[list[np.ndarray]] = []
    self._before: list[np.ndarray | None] = [None] * len(batches)

  def context(self, batch: int) -> tuple[Array, Array, Array]:
    """Returns (mask_BL, domain_B, an array with the length of the number of domains)."""
    return (
      self.tokens[batch].mask_BL,
      jnp.asarray(self.batches[batch]["domain_B"]),
      jnp.zeros(self.num_domains),
    )

  def add(self, number: int, batch: int, layer: MoEAux) -> None:
    """Adds what layer `number` with experts did with a batch. Of one batch, layers come in order."""
    before = self._before[batch] if number else None
    sums = sums_of_layer(layer, before, self.tokens[batch], len(self.named), self.num_devices)
    sums = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(sums))
    self._before[batch] = np.asarray(layer.selected_BLE, bool)
    if number == len(self.totals):
      self.totals.append(sums)
      self._sequences.append([])
    else:
      self.totals[number] = jax.tree.map(np.add, self.totals[number], sums)
    self._sequences[number].append(sums.per_sequence_BE)

  def examination(self, domains: Sequence[str]) -> Examination:
    layers = [
      total._replace(per_sequence_BE=np.concatenate(sequences))
      for total, sequences in zip(self.totals, self._sequences, strict=True)
    ]
    num_tokens_B = np.concatenate([batch["mask_BL"].sum(axis=1) for batch in self.batches])
    return Examination(tuple(layers), self.num_devices, num_tokens_B, self.named, self.counts, tuple(domains))


def _most_frequent(batches: Sequence[Batch]) -> tuple[np.ndarray, np.ndarray]:
  """Returns the most frequent token ids, the first most frequent, and their counts."""
  ids, counts = np.unique(
    np.concatenate([batch["tokens_BL"][batch["mask_BL"]] for batch in batches]), return_counts=True
  )
  order = np.argsort(-counts, kind="stable")[:MAX_NAMED]
  return ids[order], counts[order]
