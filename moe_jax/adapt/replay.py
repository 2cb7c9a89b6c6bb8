"""Router replay: a forward pass with the choices of an earlier one (2510.11370).

In reinforcement learning, the model that samples and the model that is trained differ in precision, kernels or steps, and a
router turns small differences into other experts. With replay, the trained model takes the experts that were recorded;
weights come from live logits, so gradients reach the router.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.adapt.layers import moe_layers, take_apart
from moe_jax.adapt.routes import selected
from moe_jax.data import Batch
from moe_jax.errors import InputError
from moe_jax.nn.context import Context
from moe_jax.nn.transformer import Transformer
from moe_jax.types import Array


def record(model: Transformer, batch: Batch) -> np.ndarray:
  """Returns what routers chose for a batch, as `Context.routes_XBLE` takes it.

  Raises:
    InputError: if the model has no experts, or other numbers of them in other layers.
  """
  parts = take_apart(model)
  routed = moe_layers(parts)
  if len({parts.layers[i].block.moe.num_experts for i in routed}) > 1:
    raise InputError(
      "replay: layers have different numbers of experts; choices of one number can be recorded"
    )
  chosen_RBLE = selected(model, batch)
  routes_XBLE = np.zeros((len(parts.layers), *chosen_RBLE.shape[1:]), np.float32)
  routes_XBLE[routed] = chosen_RBLE
  return routes_XBLE


class ReplayReport(NamedTuple):
  """What replay changes for a model and recorded choices."""

  differing: (
    np.ndarray
  )  # for each layer with experts, the share of recorded choices that the model does not make itself
  log_ratio: np.ndarray  # [B, L] log-probability of each target with replay minus without; 0 for padding


def report(model: Transformer, batch: Batch, routes_XBLE: np.ndarray) -> ReplayReport:
  """Returns how the model's own choices differ from the recorded ones, and what that does to log-probabilities."""
  own = record(model, batch)
  routed = moe_layers(take_apart(model))
  missed = (routes_XBLE * (1 - own))[routed].sum(axis=(1, 2, 3))
  live, replayed = (target_log_probs(model, batch, routes) for routes in (None, routes_XBLE))
  share = missed / np.maximum(routes_XBLE[routed].sum(axis=(1, 2, 3)), 1)
  return ReplayReport(share, (replayed - live) * batch["mask_BL"])


def target_log_probs(model: Transformer, batch: Batch, routes_XBLE: np.ndarray | None = None) -> np.ndarray:
  """Returns the log-probability of each target [B, L], with the choices of the routers, or those that are given."""
  return np.asarray(_log_probs(*nnx.split(model), batch, routes_XBLE))


@functools.partial(jax.jit, static_argnums=0)
def _log_probs(graphdef: nnx.GraphDef, state: nnx.State, batch: Batch, routes_XBLE: Array | None) -> Array:
  return log_probs(nnx.merge(graphdef, state), batch, routes_XBLE)


def log_probs(model: Transformer, batch: Batch, routes_XBLE: Array | None = None) -> Array:
  """`target_log_probs` inside a program, for gradients."""
  context = Context.of_batch(batch, routes_XBLE=routes_XBLE)
  logits_BLV, _ = model(batch["tokens_BL"], context)
  return jnp.take_along_axis(jax.nn.log_softmax(logits_BLV), batch["targets_BL"][..., None], axis=-1)[..., 0]
