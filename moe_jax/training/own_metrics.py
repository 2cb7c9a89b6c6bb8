"""Metrics of a user's own: which code measured them, so that numbers of two formulas never come under one name.

Also, whether they measure each layer by itself.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.errors import InputError
from moe_jax.fingerprint import digest_of_all, place
from moe_jax.nn.checks import type_name
from moe_jax.ops import metrics
from moe_jax.ops.metrics import LayerRecord
from moe_jax.training.own_steps import naming_errors
from moe_jax.types import PyTree

_LAYERS, _DOMAINS = (3, 5), 2  # of a record that is only traced


def check_own_metrics(num_experts: int, batch: int, length: int) -> None:
  """Raises `InputError` if a registered metric fails, or does not read a number or an array for each layer.

  Sums of several layers have a leading axis. A function that adds over it would give numbers of all layers together, in a
  table of layers. Nothing is computed.

  Args:
    num_experts: E, that a router scores.
    batch: B, sequences of a micro-batch.
    length: L.
  """
  real = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  record = LayerRecord(
    tokens_per_expert_BE=real(batch, num_experts),
    kept_per_expert_E=real(num_experts),
    probs_BLE=real(batch, length, num_experts),
    mask_BL=jax.ShapeDtypeStruct((batch, length), jnp.bool_),
    domain_BS=real(batch, _DOMAINS),
  )
  for name, metric in metrics.own().items():
    what = f"metric {name}"
    with naming_errors(f"{what}: sums", metric.sums):
      sums = jax.eval_shape(metric.sums, record)
    for leaf in jax.tree.leaves(sums):
      _check_type(f"{what} ({place(metric.sums)}): sums returns", leaf)
    for n in _LAYERS:
      stacked = jax.tree.map(lambda x, n=n: jax.ShapeDtypeStruct((n, *x.shape), x.dtype), sums)
      with naming_errors(f"{what}: read", metric.read):
        found = jax.eval_shape(metric.read, stacked)
      _check_layers(f"{what} ({place(metric.read)})", found, n)
      if found.ndim > 1 and (metric.training or metric.validation):
        raise InputError(
          f"{what}: read makes {list(found.shape)} of the sums of {n} layers, and a column of a table has one number of each layer; leave its "
          'title empty (training="", validation="")'
        )


def _check_layers(what: str, found: PyTree, n: int) -> None:
  if not isinstance(found, jax.ShapeDtypeStruct):
    raise InputError(f"{what}: read returns a value of type {type_name(found)}; it must return an array")
  _check_type(f"{what}: read returns", found)
  if found.shape[:1] != (n,):
    raise InputError(
      f"{what}: read makes {found.dtype}{list(found.shape)} of the sums of {n} layers; it must keep their leading axis, [{n}, "
      "...]: use axis=-1 and x[..., 0]"
    )


def _check_type(what: str, found: jax.ShapeDtypeStruct) -> None:
  """Sums are added as real numbers: a part of a complex one would be lost, and a bool would count batches."""
  if not (jnp.issubdtype(found.dtype, jnp.floating) or jnp.issubdtype(found.dtype, jnp.integer)):
    raise InputError(
      f"{what} {found.dtype}{list(found.shape)}; it must be of floating-point numbers or integers"
    )


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
