"""MoE layers with random weights, made without compiling, and their forward pass as one program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.nn import BalancerState, Context, MoE
from moe_jax.nn.ffn import MLP

B, L, D, E, K, F = 3, 8, 8, 4, 2, 6
FIELDS = {
  "num_experts": E,
  "num_experts_per_token": K,
  "expert_dim": F,
  "balancer": "switch_loss:0.5,loss_free_bias:0.1",
  "dispatcher": "sorted",
  "capacity_factor": 0.5,  # 2 of an expert's 4 fair slots
  "eval_capacity_factor": 1.0,
}
BIAS_E = np.array([0.4, -0.3, 0.0, 0.2], np.float32)


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


def initialised(make):
  """`make()` with its own initial values, by one program: one for every operation takes seconds."""
  graphdefs = []

  def build():
    graphdef, state = nnx.split(make())
    graphdefs.append(graphdef)
    return state

  state = jax.jit(build)()
  return nnx.merge(graphdefs[0], state)


@functools.partial(jax.jit, static_argnames=("graphdef", "static"))
def _forward(graphdef, state, x_BLD, arrays, static):
  wrap = lambda name, x: jax.random.wrap_key_data(x) if "key" in name and x is not None else x
  context = Context(**{name: wrap(name, x) for name, x in arrays.items()}, **dict(static))
  return nnx.merge(graphdef, state)(x_BLD, context)


def forward(layer, x_BLD, mask_BL=None, train=False, record_logits=False, **arrays):
  """`layer(x_BLD, Context(...))`, compiled as one program, as numpy. Keys are given as their data."""
  static = (("train", train), ("record_logits", record_logits))
  return jax.device_get(_forward(*nnx.split(layer), x_BLD, arrays | {"mask_BL": mask_BL}, static))


def make(dim=D, shared=None, **fields):
  """A layer with random weights; a loss-free bias, if it has one, moves choices. `shared`: activation of an MLP."""

  def build():
    rngs = nnx.Rngs(0)
    mlp = shared and MLP(dim, 2 * F, shared, rngs=rngs)
    return MoE(dim, shared=mlp, rngs=rngs, **FIELDS | fields)

  return randomized(build, BIAS_E)


def inputs(seed=0):
  return np.random.default_rng(seed).normal(size=(B, L, D)).astype(np.float32)


def keys(seed=1):
  return np.random.default_rng(seed).integers(2**32, size=(B, 2), dtype=np.uint32)
