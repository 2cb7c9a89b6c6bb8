"""How two models route the same text."""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.data import Batch
from moe_jax.errors import InputError
from moe_jax.nn.aux import by_layer, moe_auxes
from moe_jax.nn.context import Context
from moe_jax.nn.transformer import Transformer
from moe_jax.types import Array


def selected(model: Transformer, batch: Batch) -> np.ndarray:
  """Returns where the tokens of a batch are sent, before any capacity: [R, B, L, E] with ones.

  Where experts were merged, several choices of a token may stand for one expert, which is one here, too.
  """
  return np.minimum(_entries(model, batch), 1)


def _entries(model: Transformer, batch: Batch) -> np.ndarray:
  """Returns how many entries of its assignment a token has for each expert: [R, B, L, E]."""
  return np.asarray(_selected(*nnx.split(model), batch))


@functools.partial(jax.jit, static_argnums=0)
def _selected(graphdef: nnx.GraphDef, state: nnx.State, batch: Batch) -> Array:
  context = Context.of_batch(batch, record_logits=True)
  _, aux = nnx.merge(graphdef, state)(batch["tokens_BL"], context)
  blocks = [[layer.selected_BLE for layer in moe_auxes(segment)] for segment in aux]
  return jnp.stack(by_layer([found for found in blocks if found]))


def changed_routes(one: Transformer, other: Transformer, batches: Iterable[Batch]) -> np.ndarray:
  """Returns the share of choices of `one` that `other` does not make for the same token, for each layer with experts, [R].

  Each model reads its own hidden states, so changes of a layer include those that earlier layers caused.

  Raises:
    InputError: if the models have other numbers of layers with experts, or of experts.
  """
  changed, total = 0.0, 0.0
  for batch in batches:
    own, others = selected(one, batch), selected(other, batch)
    if own.shape != others.shape:
      raise InputError(
        f"changed_routes: [layers, B, L, experts] are {own.shape} and {others.shape}; they must be equal"
      )
    changed = changed + (own * (1 - others)).sum(axis=(1, 2, 3))
    total = total + own.sum(axis=(1, 2, 3))
  return changed / np.maximum(total, 1)


def max_vio(model: Transformer, batches: Iterable[Batch]) -> np.ndarray:
  """Returns max(load) / mean(load) - 1 over the experts of each layer, counted over all batches, [R].

  Two choices that stand for one merged expert count twice, as in the layer, because the expert computes both.
  """
  tokens_RE = sum(_entries(model, batch).sum(axis=(1, 2)) for batch in batches)
  return tokens_RE.max(axis=1) / tokens_RE.mean(axis=1) - 1
