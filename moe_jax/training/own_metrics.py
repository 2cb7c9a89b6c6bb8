"""Which code measured the metrics of a user's own, so that numbers of two formulas never come under one name."""

from collections.abc import Mapping
from typing import Any

from moe_jax.fingerprint import digest_of_all
from moe_jax.ops import metrics


def own_metrics() -> dict[str, str]:
  """Returns a digest of the formula of each registered metric that is no part of this package, by name."""
  return {name: digest_of_all((metric.sums, metric.read)) for name, metric in metrics.own().items()}


def metrics_said(values: Mapping[str, Any]) -> dict[str, str]:
  """Returns the digests that a config.json, a checkpoint or a result says; {} if none are known."""
  found = values.get("own_metrics")
  return dict(found) if isinstance(found, Mapping) else {}


def changed_metrics(known: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
  """Returns a text for each metric that both have, with other code. One that only one of them has is no contradiction."""
  return [
    f"{name} [{known[name]}] (now: {name} [{digest}])"
    for name, digest in now.items()
    if known.get(name, digest) != digest
  ]
