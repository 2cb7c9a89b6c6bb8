"""A published checkpoint of which one layer is in memory at a time."""

import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax import sharding
from moe_jax.errors import InputError
from moe_jax.interop.load import (
  check_tensors,
  dtype_of,
  is_run,
  mesh_in_use,
  not_loaded,
  open_checkpoint,
  with_bias,
)
from moe_jax.interop.memory import check_memory, largest_layer
from moe_jax.interop.names import Path, Piece, Stored, stored_parameters
from moe_jax.interop.place import load_parameter
from moe_jax.nn.block import Block, BlockAux
from moe_jax.nn.context import Context
from moe_jax.nn.moe import MoE
from moe_jax.nn.norm import RMSNorm
from moe_jax.nn.variables import BalancerState
from moe_jax.training.compiled import abstract_model
from moe_jax.types import Array

_ARRAYS = ("mask_BL", "key_B", "token_id_BL", "domain_B")  # of a context


class LayerStream:
  """A published checkpoint that is read layer by layer, for models that do not fit into memory.

  Args:
    folder, dtype: as for `moe_jax.load`.

  Attributes:
    config, tokenizer: as in what `moe_jax.load` returns.
    num_layers: the number of layers.

  Raises:
    InputError: as `moe_jax.load`, if the folder is that of a run, and if memory is too small for the largest layer.
  """

  def __init__(self, folder: str | os.PathLike[str], dtype: str = "float32"):
    path = pathlib.Path(folder).expanduser()
    if is_run(path):
      raise InputError(f"{path}: is a run; moe_jax.save makes a checkpoint of it, which can be streamed")
    opened = open_checkpoint(path, dtype, mtp=False)
    self.config, self.tokenizer, self._dtype = opened.config, opened.tokenizer, dtype
    self._tensors = opened.folder.tensors
    self._model = abstract_model(opened.config, opened.ids.vocab_size)
    found = list(stored_parameters(self._model, opened.family, self._tensors))
    check_tensors(opened.folder, found, not_loaded(opened.family, opened.folder, opened.config))
    self._stored = {stored.path: stored for stored in found}
    self.num_layers = sum(segment.num_layers for segment in self._model.segments)
    self._name = str(path)
    self._check_memory()

  def blocks(self) -> Iterator[tuple[int, Block]]:
    """Yields the number of every layer and its block, whose parameters are read when it is asked for."""
    for layer, place in enumerate(self._places()):
      yield layer, nnx.merge(*self._block(*place))

  def embed(self, tokens_BL: Array) -> Array:
    """Returns x_BLD in the compute dtype, of which only the rows that occur are read."""
    ids, index = np.unique(np.asarray(tokens_BL), return_inverse=True)
    piece = self._stored[("embedding_VD",)].pieces[0]
    tensor = self._tensors[piece.name]
    rows = np.concatenate([np.asarray(tensor[slice(i, i + 1), slice(0, tensor.shape[1])]) for i in ids])
    rows = rows.astype(np.float32).astype(jnp.dtype(self._dtype))
    x_BLD = jnp.asarray(rows[index.reshape(np.shape(tokens_BL))])
    return x_BLD.astype(self.config.model.compute_dtype)

  def logits(self, x_BLD: Array) -> Array:
    """Returns the logits [B, L, V], float32, for what the last layer gave. Reads the output matrix."""
    norm = RMSNorm(self.config.model.model_dim, self.config.model.norm_eps)
    norm.scale_D.set_value(self._outer(("final_norm", "scale_D")))
    tied = self.config.model.tie_embeddings
    head = self._outer(("embedding_VD",)).T if tied else self._outer(("w_head_DV",))
    head_DV = head.astype(x_BLD.dtype)
    return jnp.einsum("BLD,DV->BLV", norm(x_BLD), head_DV, preferred_element_type=jnp.float32)

  def forward(
    self, batches: Sequence[tuple[Array, Context]], see: Callable[[int, int, BlockAux], Any]
  ) -> list[Array]:
    """Runs all batches through one layer after another.

    Args:
      batches: (tokens_BL, context), all of one shape and with the same static fields.
      see: called with the number of the layer, that of the batch, and the aux of the block.

    Returns:
      x_BLD of each batch behind the last layer, for `logits`.

    Raises:
      InputError: if memory is too small for the largest layer beside the activations of all batches.
    """
    self._check_memory(sum(np.size(tokens_BL) for tokens_BL, _ in batches))
    contexts = [context._replace(token_id_BL=tokens_BL) for tokens_BL, context in batches]
    activations = [self.embed(tokens_BL) for tokens_BL, _ in batches]
    compiled: dict[tuple[int, int], Callable] = {}
    for layer, place in enumerate(self._places()):
      graphdef, state = self._block(*place)
      kind = (place[0], place[2])
      if kind not in compiled:
        compiled[kind] = _compiled(graphdef, contexts[0])
      for i, context in enumerate(contexts):
        arrays = {name: getattr(context, name) for name in _ARRAYS}
        activations[i], aux = compiled[kind](state, activations[i], arrays, layer)
        see(layer, i, aux)
      jax.block_until_ready(activations)  # what still runs would keep this layer in memory
      del state
    return activations

  def _check_memory(self, num_tokens: int = 0) -> None:
    """Raises `InputError` unless the largest layer fits, beside the activations of so many tokens."""
    mesh, state = mesh_in_use(), nnx.state(self._model)
    types = {path: dtype_of(path, v, self._dtype) for path, v in nnx.to_flat_state(state)}
    layouts = {p: v.get_value() for p, v in nnx.to_flat_state(sharding.state_shardings(mesh, state))}
    needed = dict.fromkeys(mesh.local_devices, largest_layer(self._stored.values(), types, layouts))
    model = self.config.model
    kept = num_tokens * model.model_dim * jnp.dtype(model.compute_dtype).itemsize
    what = (
      f"the largest layer beside the activations of {num_tokens:,} tokens" if kept else "the largest layer"
    )
    check_memory(f"{self._name}: {what}", needed, self._dtype, kept=kept)

  def _places(self) -> Iterator[tuple[int, int, int]]:
    """The segment, repetition and block of every layer."""
    for i, segment in enumerate(self._model.segments):
      for r in range(segment.repeats):
        for j in range(len(segment.pattern.blocks)):
          yield i, r, j

  def _outer(self, path: Path) -> Array:
    """A parameter outside of layers."""
    variable = dict(nnx.to_flat_state(nnx.state(self._model, nnx.Param)))[path]
    return self._load(self._stored[path], variable, variable.get_value())

  def _load(self, stored: Stored, variable: nnx.Variable, abstract: jax.ShapeDtypeStruct) -> Array:
    layout = sharding.state_shardings(mesh_in_use(), variable.replace(abstract)).get_value()
    return load_parameter(stored, self._tensors, dtype_of(stored.path, variable, self._dtype), layout)

  def _block(self, i: int, r: int, j: int) -> tuple[nnx.GraphDef, nnx.State]:
    """A block in two parts. A module would stay in memory until the next garbage collection."""
    above = ("segments", i, "pattern", "blocks", j)
    block = self._model.segments[i].pattern.blocks[j]
    graphdef, state = nnx.split(block)
    layers = {(*path, "balancer_state"): m for path, m in nnx.iter_modules(block) if isinstance(m, MoE)}
    filled = []
    for path, variable in nnx.to_flat_state(state):
      stored = self._stored.get((*above, *path))
      own = None if stored is None else _of_repetition(stored, r)
      if isinstance(variable, BalancerState):
        layer = layers[path]
        value = layer.balancer.init(layer.num_scored_experts)
        if own is not None:
          everywhere = sharding.replicated(mesh_in_use())
          bias = load_parameter(own, self._tensors, np.dtype(np.float32), everywhere)
          value = with_bias(self._model, stored, value, bias)
      else:
        abstract = jax.ShapeDtypeStruct(own.shape, variable.get_value().dtype)
        value = self._load(own, variable, abstract)
      filled.append((path, variable.replace(value)))
    return graphdef, nnx.from_flat_state(filled)


def _of_repetition(stored: Stored, r: int) -> Stored:
  """One repetition of a stacked parameter, without the axis of repetitions."""
  pieces = (Piece(lead, name, layout) for (first, *lead), name, layout in stored.pieces if first == r)
  return Stored(stored.path, stored.shape[1:], tuple(p._replace(lead=tuple(p.lead)) for p in pieces))


def _compiled(graphdef: nnx.GraphDef, context: Context) -> Callable:
  static = context._replace(**dict.fromkeys(_ARRAYS), step_key=None, step_stats=None)

  @jax.jit
  def run(state, x_BLD, arrays, layer):
    return nnx.merge(graphdef, state)(x_BLD, static._replace(**arrays).of_layer(layer, None))

  return run
