"""Metrics of layers with experts. Each is declared once, as sums and a function that reads them.

A layer computes the sums of one micro-batch. They are added over micro-batches, devices and the batches of an
evaluation, and read at the end. Logs, results and tables find all metrics in `METRICS`, so a new metric is
one entry there.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from moe_jax.errors import InputError
from moe_jax.ops import stats
from moe_jax.types import Array, PyTree


class LayerRecord(NamedTuple):
  """What a metric may read: one layer and one micro-batch."""

  tokens_per_expert_BE: Array  # float32 counts before capacity, per sequence
  kept_per_expert_E: Array  # float32 counts after capacity
  probs_BLE: Array  # the router's scores divided by their sum
  mask_BL: Array  # bool, False: padding
  domain_BS: Array  # float32, one-hot: the domain of each sequence


class Metric(NamedTuple):
  """A quantity to measure.

  sums: maps a `LayerRecord` to a tree of arrays that can be added over micro-batches and devices.
  read: maps the added sums to a number for each layer, or an array. It keeps leading axes, which count layers: `axis=-1`.
  training: the title of its column for training. Empty: logged, but in no table. None: not logged either.
  validation: the same for validation, where results store what training logs.
  unit: the unit of the numbers, for tables.
  format: the format of the numbers in tables.
  lower_is_better: None if neither direction is better by itself.
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
  """Returns the first sum divided by the second, or by 1 if the second is less than 1."""
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
  "mutual_information": Metric(
    _counts_by_domain, stats.mutual_information, None, "Mutual information", "nats"
  ),
  "tokens_per_expert": Metric(_counts, lambda counts: counts, ""),
  "load": Metric(_counts, stats.load, None, ""),
  "load_by_domain": Metric(_counts_by_domain, stats.load, None, ""),
}


def register(name: str, metric: Metric) -> None:
  """Adds a metric. It is measured from now on, and has a column in every table.

  Raises:
    InputError: if the name belongs to a metric of this package or to another number that it writes beside them, or
      `metric` is not a `Metric` with fields of their types.
  """
  if not isinstance(metric, Metric):
    raise InputError(f"metric {name!r}: {metric!r} is no Metric")
  if name in _BUILTIN or name.endswith(_TRAINING):
    raise InputError(f"metric {name!r}: the name is taken by moe_jax; choose another")
  _check_column(name, metric)
  METRICS[name] = metric


def _check_column(name: str, metric: Metric) -> None:
  """Raises `InputError` if tables could not show the metric, which would be noticed after training."""
  for field in ("training", "validation", "unit", "format"):
    value = getattr(metric, field)
    if not isinstance(value, str) and (value is not None or field in ("unit", "format")):
      raise InputError(f"metric {name!r}: {field} is {value!r}; it must be a text")
  if metric.lower_is_better not in (True, False, None):
    raise InputError(
      f"metric {name!r}: lower_is_better is {metric.lower_is_better!r}; it must be True, False or None"
    )
  try:
    format(1.0, metric.format)
  except ValueError:
    raise InputError(
      f"metric {name!r}: format {metric.format!r} is none of a floating-point number, such as '.3f' or ',.0f'"
    ) from None


def own() -> dict[str, Metric]:
  """Returns the metrics that a user has registered."""
  return {name: metric for name, metric in METRICS.items() if name not in _BUILTIN}


_TRAINING = "_training"  # ends the key of the column of a metric in training
_BUILTIN = frozenset(METRICS) | {
  *("seconds", "compile_seconds", "tail_steps", "num_params", "num_active_params"),
  *("loss", "total_loss", "grad_norm", "learning_rate", "attention_score", "tokens_per_second"),
  *("nll", "perplexity", "bits_per_byte", "excess_nll", "num_tokens", "num_targets", "step", "arm", "seed"),
}


def is_taken(name: str) -> bool:
  """Returns whether logs have a number of this name that is no balancing loss."""
  return name in _BUILTIN or name in METRICS


def observe(layer: LayerRecord) -> dict[str, PyTree]:
  """Returns the sums of every metric, by name."""
  return {name: metric.sums(layer) for name, metric in METRICS.items()}
