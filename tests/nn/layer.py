"""MoE layers with random weights, made without compiling, and their forward pass as one program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.nn import BalancerState, Context


def float64(variable):
  return None if variable is None else np.asarray(variable.get_value(), np.float64)


def randomized(make, bias_E=None, seed=0, scale=None):
  """`make()` with normal weights of std `scale`, or of one over the square root of their rows.

  A loss-free bias, if it has one, becomes `bias_E`. Frozen and zero parameters are drawn, too.
  """
  graphdefs = []

  def build():
    graphdef, *states = nnx.split(make(), nnx.Param, BalancerState)
    graphdefs.append(graphdef)
    return states

  params, balancer = jax.eval_shape(build)
  rng = np.random.default_rng(seed)

  def draw(leaf):
    std = scale or (leaf.shape[-2] if len(leaf.shape) > 1 else 1) ** -0.5
    return jnp.asarray(std * rng.normal(size=leaf.shape), jnp.float32)

  bias = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape) if bias_E is None else jnp.asarray(bias_E), balancer)
  return nnx.merge(graphdefs[0], jax.tree.map(draw, params), bias)


@functools.partial(jax.jit, static_argnames=("graphdef", "static"))
def _forward(graphdef, state, x_BLD, arrays, static):
  wrap = lambda name, x: jax.random.wrap_key_data(x) if "key" in name and x is not None else x
  context = Context(**{name: wrap(name, x) for name, x in arrays.items()}, **dict(static))
  return nnx.merge(graphdef, state)(x_BLD, context)


def forward(layer, x_BLD, mask_BL=None, train=False, record_logits=False, **arrays):
  """`layer(x_BLD, Context(...))`, compiled as one program, as numpy. Keys are given as their data."""
  static = (("train", train), ("record_logits", record_logits))
  return jax.device_get(_forward(*nnx.split(layer), x_BLD, arrays | {"mask_BL": mask_BL}, static))
