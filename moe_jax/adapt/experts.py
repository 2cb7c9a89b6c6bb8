"""Fewer experts: pruning and merging. What the router knows of them follows."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from scipy.optimize import linear_sum_assignment

from moe_jax.adapt.calibrate import Calibration
from moe_jax.adapt.layers import Layer, moe_layers, put_together, take_apart
from moe_jax.errors import InputError, require_option
from moe_jax.nn.routers import ROUTERS
from moe_jax.nn.transformer import Transformer
from moe_jax.registry import as_inner

PREFIX = "ffn.experts."
Calibrations = Mapping[int, Calibration]  # of each layer with experts, by its number


def prune(model: Transformer, scores: Mapping[int, np.ndarray], num_experts: int) -> Transformer:
  """Returns `model` with the `num_experts` experts of each layer that have the highest scores, in their order.

  The columns of the router and the biases of a balancer follow. Without experts that are never chosen, the model is the
  same, unless the router reads a softmax over all experts, which is then over those that are left: as weights
  (`softmax=before`), or with a bias added to it. A router that limits groups has groups of neighbours, which are others
  among fewer experts.

  Args:
    model: has experts.
    scores: [E] for each layer with experts, by its number: `usage`, `output_norms` or `losses` of `calibrate`.
    num_experts: how many are left.

  Raises:
    InputError: if there are not as many experts, or fewer would be left than a token takes.
  """
  parts = take_apart(model)
  routed = moe_layers(parts)
  check_number(parts.layers, routed, num_experts)
  layers = list(parts.layers)
  for i in routed:
    keep = np.sort(np.argsort(-np.asarray(scores[i], np.float64), kind="stable")[:num_experts])
    layers[i] = select(layers[i], keep)
  return put_together(parts._replace(layers=tuple(layers)))


def select(layer: Layer, index: Sequence[int]) -> Layer:
  """Returns a layer with the experts `index`, in this order, and what its router and balancer have of them."""
  index = np.asarray(index)
  e = layer.block.moe.num_experts
  values = {
    path: _selected(path, value, layer.axes.get(path), index, e) for path, value in layer.values.items()
  }
  moe = dataclasses.replace(layer.block.moe, num_experts=len(index))
  return layer._replace(block=dataclasses.replace(layer.block, moe=moe), values=values)


def _selected(path: str, value: Any, axes: tuple | None, index: np.ndarray, num_experts: int) -> Any:
  if path == "ffn.balancer_state":
    return jax.tree.map(lambda x: x[index] if np.shape(x)[:1] == (num_experts,) else x, value)
  if not path.startswith("ffn.") or axes is None:
    return value
  for axis, name in enumerate(axes):
    if name in ("expert", "router") and value.shape[axis] >= num_experts:
      # Behind the experts, a router may have columns of experts without a network.
      value = np.take(value, np.concatenate([index, np.arange(num_experts, value.shape[axis])]), axis)
  return value


def merge(
  model: Transformer,
  calibrations: Calibrations,
  num_experts: int,
  *,
  weights: str = "usage",
  similarity: str = "logits",
  align: bool = True,
  router: str = "kept",
) -> Transformer:
  """Returns `model` with the experts of each layer merged to `num_experts` (M-SMoE, 2310.01334, section 3.2).

  The most used experts lead. Each other one joins the leader that it is most similar to. The merged expert is the mean
  of its group.

  Args:
    model: has experts.
    calibrations: of `calibrate`.
    num_experts: how many are left.
    weights: of an expert in the mean of its group: "usage", or "equal".
    similarity: of two experts: "logits", the correlation of their logits on the calibration text, "columns", the cosine of
      their columns in the router, or "weights", the cosine of their parameters.
    align: whether the hidden units of each expert are first matched with those of its leader, by the permutation
      with the largest sum of products (Hungarian algorithm).
    router: "kept": the router chooses among as many as before, and a merged expert gets the weights of its whole group,
      so merging equal experts changes nothing. "averaged": its columns are merged, too, and it has fewer logits.

  Raises:
    InputError: if an option is unknown, there are not as many experts, or the router has no columns that the option
      needs.
  """
  require_option("merge", "weights", weights, ("usage", "equal"))
  require_option("merge", "similarity", similarity, ("logits", "columns", "weights"))
  require_option("merge", "router", router, ("kept", "averaged"))
  parts = take_apart(model)
  routed = moe_layers(parts)
  check_number(parts.layers, routed, num_experts)
  layers = list(parts.layers)
  for i in routed:
    usage_E = np.asarray(calibrations[i].tokens_E, np.float64)
    group_E = groups_of(usage_E, _similarity(layers[i], calibrations[i], similarity), num_experts)
    mass_E = usage_E + 1e-9 * usage_E.sum() + 1e-30 if weights == "usage" else np.ones_like(usage_E)
    layers[i] = merged(layers[i], group_E, mass_E, usage_E, align=align, keep_router=router == "kept")
  return put_together(parts._replace(layers=tuple(layers)))


def check_number(
  layers: Sequence[Layer], routed: Sequence[int], num_experts: int, name: str = "num_experts"
) -> None:
  """Raises `InputError`, with `name`, unless each layer has as many experts, and a token takes no more of them."""
  for i in routed:
    moe = layers[i].block.moe
    if not moe.num_experts_per_token <= num_experts <= moe.num_experts:
      raise InputError(
        f"{name}={num_experts}: layer {i} has {moe.num_experts} experts and a token takes "
        f"{moe.num_experts_per_token}; choose {moe.num_experts_per_token} to {moe.num_experts}"
      )


def groups_of(usage_E: np.ndarray, similarity_EE: np.ndarray, num_experts: int) -> np.ndarray:
  """Returns the group of each expert, [E] in [0, num_experts). Groups are numbered in the order of their leaders."""
  leaders = np.sort(np.argsort(-usage_E, kind="stable")[:num_experts])
  group_E = np.argmax(similarity_EE[:, leaders], axis=1)
  group_E[leaders] = np.arange(num_experts)
  return group_E


def _similarity(layer: Layer, calibration: Calibration, kind: str) -> np.ndarray:
  if kind == "logits":
    return calibration.logit_correlation_EE
  if kind == "columns":
    columns = _columns(layer)
    return _cosines(columns.T)
  flat = [_by_expert(layer, path) for path in _expert_paths(layer)]
  return _cosines(np.concatenate(flat, axis=1))


def _columns(layer: Layer) -> np.ndarray:
  found = layer.values.get("ffn.router.w_router_DE")
  if found is None:
    raise InputError(
      f"--router={layer.block.moe.router}: has no columns of experts; choose similarity=logits, router=kept"
    )
  return np.asarray(found, np.float64)


def _cosines(x_EX: np.ndarray) -> np.ndarray:
  unit = x_EX / np.maximum(np.linalg.norm(x_EX, axis=1, keepdims=True), 1e-30)
  return unit @ unit.T


def _expert_paths(layer: Layer) -> list[str]:
  return [
    path for path in layer.values if path.startswith(PREFIX) and layer.axes.get(path, ())[:1] == ("expert",)
  ]


def _by_expert(layer: Layer, path: str) -> np.ndarray:
  value = np.asarray(layer.values[path], np.float64)
  return value.reshape(len(value), -1)


def merged(
  layer: Layer,
  group_E: np.ndarray,
  mass_E: np.ndarray,
  usage_E: np.ndarray,
  *,
  align: bool,
  keep_router: bool,
) -> Layer:
  """Returns a layer with one expert for each group: the mean of its experts with weights `mass_E`."""
  num_groups = int(group_E.max()) + 1
  order_EF = _alignment(layer, group_E, usage_E) if align else None
  share_EG = np.where(group_E[:, None] == np.arange(num_groups)[None], mass_E[:, None], 0.0)
  share_EG /= share_EG.sum(axis=0, keepdims=True)
  values = dict(layer.values)
  for path in _expert_paths(layer):
    value, axes = np.asarray(layer.values[path], np.float64), layer.axes[path]
    if order_EF is not None and "mlp" in axes:
      axis = axes.index("mlp")
      value = np.stack([np.take(x, order, axis - 1) for x, order in zip(value, order_EF, strict=True)])
    values[path] = np.tensordot(share_EG.T, value, axes=1).astype(layer.values[path].dtype)
  moe = dataclasses.replace(layer.block.moe, num_experts=num_groups)
  if keep_router:
    own = {path: x for path, x in values.items() if not path.startswith("ffn.router.")}
    own |= {f"ffn.router.router.{path}": x for path, x in layer.under("ffn.router.").items()}
    values = own | {"ffn.router.expert_X": group_E.astype(np.int32)}
    spec = f"merged_topk:router={as_inner(moe.router)}:logits={len(group_E)}"
    moe = dataclasses.replace(moe, router=ROUTERS.resolve(spec))
  else:
    columns = _columns(layer)
    values["ffn.router.w_router_DE"] = (columns @ share_EG).astype(
      layer.values["ffn.router.w_router_DE"].dtype
    )
  return layer._replace(block=dataclasses.replace(layer.block, moe=moe), values=values)


def _alignment(layer: Layer, group_E: np.ndarray, usage_E: np.ndarray) -> np.ndarray:
  """The order of the hidden units of each expert that matches those of the most used expert of its group, [E, F]."""
  features = []  # of each unit: what enters it and what leaves it
  for path in _expert_paths(layer):
    if "mlp" in layer.axes[path]:
      value = np.moveaxis(np.asarray(layer.values[path], np.float64), layer.axes[path].index("mlp"), 1)
      features.append(value.reshape(*value.shape[:2], -1))
  units_EFX = np.concatenate(features, axis=-1)
  order_EF = np.tile(np.arange(units_EFX.shape[1]), (len(group_E), 1))
  for group in range(int(group_E.max()) + 1):
    members = np.flatnonzero(group_E == group)
    leader = members[np.argmax(usage_E[members])]
    for e in members[members != leader]:
      order_EF[e] = linear_sum_assignment(units_EFX[leader] @ units_EFX[e].T, maximize=True)[1]
  return order_EF
