"""What the matrices of experts multiply on a calibration text, for scales that follow it."""

import functools
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.adapt.calibrate import walk
from moe_jax.adapt.layers import moe_layers, take_apart
from moe_jax.data import Batch
from moe_jax.errors import InputError
from moe_jax.nn.context import Context
from moe_jax.nn.experts import as_experts
from moe_jax.nn.moe import MoE
from moe_jax.nn.transformer import Transformer
from moe_jax.ops.experts import Batched, Wrapper
from moe_jax.types import Array, PyTree

Inputs = Mapping[int, Mapping[str, np.ndarray]]  # by layer and name of a matrix: [E, n, X]


def expert_inputs(model: Transformer, batches: Iterable[Batch], per_expert: int = 128) -> Inputs:
  """Returns rows that enter each matrix of each expert, as many for a rare expert as for a busy one.

  An expert gets the first `per_expert` tokens that are sent to it. One that is sent fewer gets other tokens of the text
  beside them, so that its scales do not follow a handful of tokens.

  Args:
    model: its experts have matrices of their own: adapters are merged, and nothing is quantised.
    batches: of a calibration text, all of one shape.
    per_expert: n.

  Returns:
    float32 [E, n, X] by the number of the layer and the name of the matrix.

  Raises:
    InputError: if the model has no experts, or the text has fewer than `per_expert` tokens.
  """
  routed = moe_layers(take_apart(model))
  graphdef, state = nnx.split(model)
  seen: list[list[tuple[np.ndarray, np.ndarray]]] = []
  for batch in batches:
    seen.append(jax.tree.map(np.asarray, jax.device_get(_routed_rows(graphdef, state, batch))))
    mask_T = np.asarray(batch["mask_BL"]).reshape(-1)
    seen[-1] = [(x_TD[mask_T], is_sent_TE[mask_T]) for x_TD, is_sent_TE in seen[-1]]
  tokens = sum(len(layers[0][0]) for layers in seen)
  if tokens < per_expert:
    raise InputError(f"calibration text: has {tokens} tokens, at least {per_expert} are needed")
  found = {}
  for i, (number, layer) in enumerate(zip(routed, _moe_layers(model), strict=True)):
    x_TD, is_sent_TE = (np.concatenate([layers[i][part] for layers in seen]) for part in (0, 1))
    rows_END = np.stack([x_TD[_chosen(is_sent_T, per_expert)] for is_sent_T in is_sent_TE.T])
    found[number] = _entering(layer, rows_END)
  return found


def _chosen(is_sent_T: np.ndarray, number: int) -> np.ndarray:
  """The first tokens that an expert is sent, and if they are too few, the first others."""
  return np.concatenate([np.flatnonzero(is_sent_T), np.flatnonzero(~is_sent_T)])[:number]


@functools.partial(jax.jit, static_argnums=0)
def _routed_rows(graphdef: nnx.GraphDef, state: PyTree, batch: Batch) -> list[tuple[Array, Array]]:
  """For each layer with experts, its input [T, D] and which tokens are sent where [T, E]."""

  def see(layer: MoE, x_BLD: Array, context: Context) -> tuple[Array, Array]:
    is_sent_BLE = layer(x_BLD, context._replace(record_logits=True))[1].selected_BLE
    flat = lambda x: x.reshape(-1, x.shape[-1])
    return flat(x_BLD).astype(jnp.float32), flat(is_sent_BLE)[:, : layer.num_experts] > 0

  return walk(nnx.merge(graphdef, state), batch, see)


def _moe_layers(model: Transformer) -> list[MoE]:
  """The layers with experts of a model, each with its own parameters."""
  found = []
  for segment in model.segments:
    pattern_def, stacked = nnx.split(segment.pattern)
    for repetition in range(segment.repeats):
      own = jax.tree.map(lambda x, r=repetition: x[r], stacked)
      found += [block.ffn for block in nnx.merge(pattern_def, own).blocks if isinstance(block.ffn, MoE)]
  return found


class _Recording(Wrapper):
  """A product that keeps what it multiplies."""

  def __init__(self):
    super().__init__(Batched())
    self.kept: list[tuple[Array, Array]] = []

  def __call__(self, rows: Array, w_EXY: Array) -> Array:
    self.kept.append((rows, w_EXY))
    return self.product(rows, w_EXY)

  def ffn(self, activation, rows, w_in, w_out_EFD):
    return self(self.hidden(activation(*(self(rows, w) for w in w_in))), w_out_EFD)


def _entering(layer: MoE, rows_END: np.ndarray) -> dict[str, np.ndarray]:
  product = _Recording()
  as_experts(layer.experts, jnp.float32, gather=True)(jnp.asarray(rows_END), product)
  found = {}
  for name, w in vars(layer.experts).items():
    if isinstance(w, nnx.Param):
      value = np.asarray(w.get_value(), np.float32)
      for rows, used in product.kept:
        if used.shape == value.shape and np.array_equal(used, value):
          found[name] = np.asarray(rows)
  if not found:
    raise InputError("expert_inputs: the experts have no matrices of their own; take off what is around them")
  return found
