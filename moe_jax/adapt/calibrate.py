"""What a model does with its experts on a calibration text: usage, output norms, and what the loss of each would cost."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.adapt.layers import moe_layers, take_apart
from moe_jax.data import Batch
from moe_jax.errors import InputError
from moe_jax.nn.context import Context
from moe_jax.nn.experts import as_experts
from moe_jax.nn.moe import MoE, group_context
from moe_jax.nn.transformer import Transformer
from moe_jax.ops.experts import Batched
from moe_jax.ops.routing.common import expert_weights, selected_experts
from moe_jax.types import Array, PyTree


class Calibration(NamedTuple):
  """What one layer did with the tokens of a text."""

  tokens_E: np.ndarray  # how many were sent to each expert
  weights_E: np.ndarray  # the sum of their combine weights
  # the mean over its tokens of combine weight x norm of the expert's output (REAP, 2510.13999, eq. 9)
  output_norm_E: np.ndarray
  logit_correlation_EE: np.ndarray  # of the logits, over tokens
  probability_E: (
    np.ndarray
  )  # the mean over tokens of the router's distribution: its scores, divided by their sum


def calibrate(model: Transformer, batches: Iterable[Batch], min_tokens: int = 1) -> dict[int, Calibration]:
  """Returns what each layer with experts does on a text, by the number of the layer.

  Args:
    model: its MoE layers are plain: `ffn=moe`.
    batches: of a calibration text, all of one shape.
    min_tokens: the fewest tokens that the busiest expert must see.

  Raises:
    InputError: if the model has no experts or other layers with experts, or the text is too short.
  """
  routed = moe_layers(take_apart(model))
  total: list[dict] | None = None
  graphdef, state = nnx.split(model)
  for batch in batches:
    found = jax.device_get(_observe(graphdef, state, batch))
    found = jax.tree.map(lambda x: np.asarray(x, np.float64), found)
    total = found if total is None else jax.tree.map(np.add, total, found)
  tokens = 0 if total is None else min(sums["tokens_E"].max() for sums in total)
  if tokens < min_tokens:
    raise InputError(
      f"calibration text: the busiest expert of a layer sees {tokens:.0f} tokens, at least {min_tokens} are needed"
    )
  return {i: _read(sums) for i, sums in zip(routed, total, strict=True)}


def _read(sums: dict) -> Calibration:
  count = sums["count"]
  mean_E = sums["logits_E"] / count
  covariance_EE = sums["logits_EE"] / count - np.outer(mean_E, mean_E)
  std_E = np.sqrt(np.maximum(np.diag(covariance_EE), 1e-30))
  return Calibration(
    sums["tokens_E"],
    sums["weights_E"],
    sums["norms_E"] / np.maximum(sums["tokens_E"], 1),
    covariance_EE / np.outer(std_E, std_E),
    sums["probs_E"] / count,
  )


@functools.partial(jax.jit, static_argnums=0)
def _observe(graphdef: nnx.GraphDef, state: PyTree, batch: Batch) -> list[dict[str, Array]]:
  """Sums over the tokens of a batch for each layer with experts."""
  return walk(nnx.merge(graphdef, state), batch, _of_layer)


def walk(model: Transformer, batch: Batch, see: Callable[[MoE, Array, Context], Any]) -> list[Any]:
  """Returns what `see` says of each layer with experts and its input, block by block."""
  tokens_BL = batch["tokens_BL"]
  context = Context.of_batch(batch, token_id_BL=tokens_BL)
  x_BLD = model.embedding_VD[...].astype(model.config.compute_dtype)[tokens_BL]
  found, number = [], 0
  for segment in model.segments:
    pattern_def, stacked = nnx.split(segment.pattern)
    for repetition in range(segment.repeats):
      own = jax.tree.map(lambda x, r=repetition: x[r], stacked)
      for block in nnx.merge(pattern_def, own).blocks:
        inputs: list[Array] = []
        here = context.of_layer(number, None)
        x_BLD, _ = block.mixer_residual(block.mixer, x_BLD, here)
        x_BLD, _ = block.ffn_residual(functools.partial(_recording, inputs, block.ffn), x_BLD, here)
        if isinstance(block.ffn, MoE):
          found.append(see(block.ffn, inputs[0], here))
        number += 1
  return found


def _recording(inputs: list[Array], part: nnx.Module, x_BLD: Array, context: Context) -> tuple[Array, PyTree]:
  inputs.append(x_BLD)
  return part(x_BLD, context)


def _of_layer(layer: MoE, x_BLD: Array, context: Context) -> dict[str, Array]:
  if type(layer) is not MoE:
    raise InputError(f"calibrate: {type(layer).__name__} is no plain MoE layer; ffn=moe is")
  batch, length, dim = x_BLD.shape
  t = layer.tokens_per_group(length)
  state = layer.balancer_state.get_value()
  own = group_context(context, x_BLD.shape, t, layer.balancer.bias(state))
  x_GTD = x_BLD.reshape(-1, t, dim)
  routing = layer.router(x_GTD.astype(jnp.float32), own._replace(layer_input=x_GTD))
  flat = lambda x: x.reshape(batch * length, -1)[:, : layer.num_experts]
  weight_TE = flat(jax.vmap(expert_weights)(routing))
  entries_TE = flat(jax.vmap(selected_experts)(routing))
  is_sent_TE = jnp.minimum(entries_TE, 1)  # two choices of a token may stand for one merged expert
  rows_ETD = jnp.broadcast_to(x_BLD.reshape(1, -1, dim), (layer.num_experts, batch * length, dim))
  y_ETD = as_experts(layer.experts.for_step(None), x_BLD.dtype, gather=True)(rows_ETD, Batched())
  norm_TE = jnp.linalg.norm(y_ETD.astype(jnp.float32), axis=-1).T
  mask_T1 = routing.mask_T.reshape(-1, 1).astype(jnp.float32)
  logits_TE = flat(routing.logits_TE) * mask_T1
  return {
    "tokens_E": is_sent_TE.sum(axis=0),
    "weights_E": weight_TE.sum(axis=0),
    "norms_E": (weight_TE * norm_TE).sum(axis=0),
    "logits_E": logits_TE.sum(axis=0),
    "probs_E": (jax.nn.softmax(flat(routing.log_scores_TE), axis=-1) * mask_T1).sum(axis=0),
    "logits_EE": jnp.einsum("TX,TY->XY", logits_TE, logits_TE, precision=jax.lax.Precision.HIGHEST),
    "count": mask_T1.sum(),
  }


def losses(model: Transformer, batches: Iterable[Batch]) -> dict[int, np.ndarray]:
  """Returns, for each layer with experts, what the loss of each expert costs: [E] in nats per token.

  The loss of an expert means that its parameters are zero, so it adds nothing where it is chosen. The text is read
  once for each expert of the model.

  Raises:
    InputError: if the model has no experts.
  """
  parts = take_apart(model)
  routed, batches = moe_layers(parts), list(batches)
  graphdef, state = nnx.split(model)
  targets = sum(int(batch["mask_BL"].sum()) for batch in batches)
  mean = lambda state: sum(float(_nll(graphdef, state, batch)) for batch in batches) / targets
  whole, found, number = mean(state), {}, 0
  for i, segment in enumerate(model.config.blocks):
    for repetition in range(segment.repeats):
      for j in range(len(segment.pattern)):
        if number in routed:
          e = parts.layers[number].block.moe.num_experts
          without = (mean(_without(state, i, j, repetition, expert)) for expert in range(e))
          found[number] = np.array([cost - whole for cost in without])
        number += 1
  return found


def _without(state: nnx.State, segment: int, block: int, repetition: int, expert: int) -> nnx.State:
  beginning = ("segments", segment, "pattern", "blocks", block, "ffn", "experts")
  flat = []
  for path, variable in nnx.to_flat_state(state):
    if path[: len(beginning)] == beginning:
      variable = variable.replace(variable.get_value().at[repetition, expert].set(0))
    flat.append((path, variable))
  return nnx.from_flat_state(flat)


@functools.partial(jax.jit, static_argnums=0)
def _nll(graphdef: nnx.GraphDef, state: nnx.State, batch: Batch) -> Array:
  logits_BLV, _ = nnx.merge(graphdef, state)(batch["tokens_BL"], Context.of_batch(batch))
  log_probs_BLV = jax.nn.log_softmax(logits_BLV, axis=-1)
  nll_BL = -jnp.take_along_axis(log_probs_BLV, batch["targets_BL"][..., None], axis=-1)[..., 0]
  return jnp.sum(nll_BL * batch["mask_BL"])
