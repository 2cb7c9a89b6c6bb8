"""Tiny random models, and how models and folders are compared."""

import math

import jax
import numpy as np
from flax import nnx

from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.nn.transformer import Transformer
from moe_jax.nn.variables import BalancerState

V = 48
MIXTRAL = ModelConfig(
  num_layers=2,
  model_dim=16,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  dense_dim=24,
  norm_eps=1e-5,
  moe=MoEConfig(num_experts=4, expert_dim=24, dispatcher="dropless"),
)


def random_model(config: ModelConfig, vocab_size: int = V, seed: int = 0) -> Transformer:
  """A model with random values in every parameter and every bias of a balancer. Nothing is compiled."""
  found = []
  jax.eval_shape(lambda: found.append(Transformer(config, vocab_size, rngs=nnx.Rngs(0))))
  graphdef, state = nnx.split(found[0])
  rng = np.random.default_rng(seed)

  def draw(leaf):
    return jax.numpy.asarray(rng.normal(scale=0.3, size=leaf.shape).astype(leaf.dtype))

  def fill(variable):
    value = variable.get_value()
    return variable.replace(jax.tree.map(draw, value))

  is_variable = lambda leaf: isinstance(leaf, nnx.Variable)
  return nnx.merge(graphdef, jax.tree.map(fill, state, is_leaf=is_variable))


def traced_memory(shape, dtype):
  """Memory that JAX uses as it is, and that `tracemalloc` sees, in place of `moe_jax.interop.place._aligned`."""
  size = math.prod(shape) * dtype.itemsize
  memory = np.empty(size + 64, np.uint8)
  first = -memory.ctypes.data % 64
  return memory[first : first + size].view(dtype).reshape(shape)


def assert_same_model(one, other, only=(nnx.Param, BalancerState)):
  """All variables are equal, bit for bit."""
  states = [nnx.to_flat_state(nnx.state(model, only)) for model in (one, other)]
  for (path, a), (_, b) in zip(*states, strict=True):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
      assert x.dtype == y.dtype
      np.testing.assert_array_equal(x, y, err_msg=str(path))
