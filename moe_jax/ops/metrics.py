"""What is measured of a layer with experts: each metric is declared once, as sums and a way to read them.

A layer gives the sums of one micro-batch. They add over micro-batches, devices and batches of an evaluation; only then
are they read. Logs, results and tables find a metric here, so adding one is one entry of `METRICS`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from moe_jax.errors import InputError
from moe_jax.ops import stats
from moe_jax.types import Array, PyTree


class LayerRecord(NamedTuple):
  """What a metric may read: one layer in one micro-batch."""

  tokens_per_expert_BE: Array  # float32 counts before capacity, per sequence
  kept_per_expert_E: Array  # float32 counts after capacity
  probs_BLE: Array  # the router's scores divided by their sum
  mask_BL: Array  # bool, False: padding
  domain_BS: Array  # float32, one-hot: the domain of each sequence


class Metric(NamedTuple):
  """One thing to measure.

  sums: `LayerRecord` -> a tree of arrays that add up.
  read: those sums, over whatever was added -> a number per layer, or an array. Leading axes are kept.
  training, validation: the title of its column in tables; None: it is not in that table. An empty title: logged or
    stored, and in no table.
  unit, format: of the numbers in tables.
  lower_is_better: None where neither direction is a virtue by itself.
  """

  sums: Callable[[LayerRecord], PyTree]
  read: Callable[[PyTree], Array]
  training: str | None = None
  validation: str | None = None
  unit: str = ""
  format: str = ".4f"
  lower_is_better: bool | None = None


def _counts(layer: LayerRecord) -> Array:
  return layer.tokens_per_expert_BE.sum(axis=0)


def _counts_and_kept(layer: LayerRecord) -> tuple[Array, Array]:
  return _counts(layer), layer.kept_per_expert_E


def _counts_by_domain(layer: LayerRecord) -> Array:
  return jnp.einsum("BE,BS->SE", layer.tokens_per_expert_BE, layer.domain_BS)


def _entropy_and_tokens(layer: LayerRecord) -> tuple[Array, Array]:
  entropy_BL = stats.entropy(layer.probs_BLE)
  return jnp.sum(jnp.where(layer.mask_BL, entropy_BL, 0)), layer.mask_BL.sum().astype(jnp.float32)


def ratio(sums: tuple[Array, Array]) -> Array:
  """The first sum over the second; 0 where that is 0."""
  return sums[0] / jnp.maximum(sums[1], 1)


METRICS: dict[str, Metric] = {
  "max_vio": Metric(_counts, stats.max_vio, "MaxVio batch", "MaxVio global", "", ".3f", True),
  "dropped_fraction": Metric(
    _counts_and_kept,
    lambda sums: stats.dropped_fraction(*sums),
    "Dropped, train",
    "Dropped, valid.",
    "fraction",
    ".4f",
    True,
  ),
  "dead_experts": Metric(
    _counts, stats.dead_experts, None, "Dead experts", "per layer", ".2f", lower_is_better=True
  ),
  "load_entropy": Metric(
    _counts, stats.load_entropy, None, "Load entropy", "of log E", lower_is_better=False
  ),
  "router_entropy": Metric(_entropy_and_tokens, ratio, "", "Router entropy", "nats", ".3f"),
  "mutual_information": Metric(_counts_by_domain, stats.mutual_information, None, "Mutual inf.", "nats"),
  "tokens_per_expert": Metric(_counts, lambda counts: counts, ""),
  "load": Metric(_counts, stats.load, None, ""),
  "load_by_domain": Metric(_counts_by_domain, stats.load, None, ""),
}


def register(name: str, metric: Metric) -> None:
  """Adds a metric of your own. It is measured from then on, and its title appears in every table.

  Raises:
    InputError: the name is taken by another metric, or `metric` is none.
  """
  if not isinstance(metric, Metric):
    raise InputError(f"metric {name!r}: {metric!r} is no Metric")
  if name in METRICS and name in _BUILTIN:
    raise InputError(f"metric {name!r}: the name is taken by moe_jax; choose another")
  METRICS[name] = metric


_BUILTIN = frozenset(METRICS)


def observe(layer: LayerRecord) -> dict[str, PyTree]:
  """The sums of every metric."""
  return {name: metric.sums(layer) for name, metric in METRICS.items()}
