"""A model made ready to generate: nothing is dropped, and its parameters are on the mesh in use."""

import dataclasses
import functools
import math

import jax
from flax import nnx

from moe_jax import sharding
from moe_jax.errors import InputError
from moe_jax.nn.build import different_blocks
from moe_jax.nn.leaks import deciding_method, leak, router_of_domain
from moe_jax.nn.moe import MoE
from moe_jax.nn.transformer import Transformer
from moe_jax.sharding.dispatchers import DISPATCHERS, Dispatcher, make_dispatcher


def dropless(model: Transformer) -> Transformer:
  """Returns the model with layers that drop no token, whatever their dispatcher and groups were.

  It shares the parameters of `model`.
  """
  model = nnx.merge(*nnx.split(model))
  for _, layer in nnx.iter_modules(model):
    if isinstance(layer, MoE):
      layer.dispatcher, layer.group_size = _dropless(), 0
  return model


@functools.cache
def _dropless() -> Dispatcher:
  """One object, so that programs of the same model are compiled once."""
  return make_dispatcher("dropless")


def check_generates(model: Transformer) -> None:
  """Raises `InputError` if the next token cannot be told from those before it alone, without the domain of their text."""
  if not model.config.causal:
    raise InputError(
      "generate: the model sees later tokens (objective masked_lm), so it predicts no next one"
    )
  if router := router_of_domain(model.config):
    raise InputError(
      f"generate: --router={router} reads the domain of each sequence, which a prompt does not have; train with another "
      "one to generate"
    )
  for block in different_blocks(model.config):
    moe = dataclasses.replace(block.moe, dispatcher=DISPATCHERS.resolve("dropless"))
    if leak(dataclasses.replace(block, moe=moe)):
      flag, text = deciding_method(block)
      raise InputError(
        f"generate: with --{flag}={text} an output depends on later tokens, which are not there yet; train with "
        "another one to generate"
      )


def on_mesh(model: Transformer) -> Transformer:
  """Returns the model with its parameters on the mesh in use (`jax.set_mesh`); as it is without a mesh."""
  mesh = jax.sharding.get_mesh()
  if mesh.empty:
    return model
  graphdef, state = nnx.split(model)
  return nnx.merge(graphdef, jax.device_put(state, sharding.state_shardings(mesh, state)))


def rows_of_mesh() -> int:
  """Returns what the rows of a batch must be a multiple of on the mesh in use."""
  sizes = jax.sharding.get_mesh().shape
  return math.prod(sizes.get(axis, 1) for axis in sharding.BATCH_AXES)
