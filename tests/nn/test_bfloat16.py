"""What is computed in bfloat16 keeps its gradients: sums over many tokens do not end at 256, and every network trains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.nn import Context, MoE
from moe_jax.nn.experts import EXPERTS
from moe_jax.nn.transformer import Transformer
from moe_jax.nn.variables import plus
from moe_jax.ops.experts import Sorted
from tests import tiny
from tests.nn.layer import randomized

MANY = 10_000  # far above 256, where a sum of ones in bfloat16 ends
B, L, D, E, K, F = 4, 8, 32, 4, 2, 32


def test_the_gradient_of_an_embedding_counts_all_tokens():
  config = tiny.change(tiny.CONFIG, compute_dtype="bfloat16", num_layers=1).model
  model = Transformer(config, tiny.VOCAB, rngs=nnx.Rngs(0))

  graphdef, params, rest = nnx.split(model, nnx.Param, ...)

  def loss(params):
    x_BLD = nnx.merge(graphdef, params, rest)._embedded(jnp.zeros((1, MANY), jnp.int32))
    assert x_BLD.dtype == jnp.bfloat16
    return x_BLD.astype(jnp.float32).sum()

  gradient_VD = jax.grad(loss)(params).embedding_VD[...]
  np.testing.assert_array_equal(gradient_VD[0], MANY)
  np.testing.assert_array_equal(gradient_VD[1:], 0)


def test_the_gradient_of_a_bias_counts_all_rows():
  ones = jnp.ones((MANY, 3), jnp.bfloat16)
  product = Sorted(jnp.array([MANY - 2000, 1000]), MANY)  # and 1,000 rows that belong to no expert
  of_experts = jax.grad(lambda b_EX: product.per_row(b_EX)[: MANY - 1000].astype(jnp.float32).sum())
  found = of_experts(jnp.ones((2, 3), jnp.bfloat16))
  np.testing.assert_allclose(found.astype(np.float32), [[MANY - 2000] * 3, [1000] * 3], rtol=2**-8)
  of_bias = jax.grad(lambda b_X: plus(ones, b_X).astype(jnp.float32).sum())
  np.testing.assert_array_equal(of_bias(jnp.ones(3)), MANY)


@pytest.mark.parametrize("name", sorted(EXPERTS.builtin - {"quantised"}))
def test_every_network_of_experts_trains_in_bfloat16(name):
  """Without drops, as the presets of published models do. Choices are those of float32; `quantised` has nothing to train."""
  moe = randomized(
    lambda: MoE(
      D,
      num_experts=E,
      num_experts_per_token=K,
      expert_dim=F,
      experts=EXPERTS.resolve(name),
      dispatcher="dropless",
      rngs=nnx.Rngs(0),
    ),
    seed=0,
  )
  graphdef, params, rest = nnx.split(moe, nnx.Param, ...)
  x_BLD, cotangent_BLD = np.random.default_rng(1).normal(size=(2, B, L, D)).astype(jnp.bfloat16)
  keys_B, step_key = jax.random.split(jax.random.key(7), B), jax.random.key(8)

  @jax.jit
  def gradients(params, x_BLD):
    def loss(params):
      context = Context(key_B=keys_B, step_key=step_key, train=True)
      y_BLD, _ = nnx.merge(graphdef, params, rest)(x_BLD, context)
      return jnp.vdot(y_BLD.astype(jnp.float32), cotangent_BLD.astype(jnp.float32))

    return jax.grad(loss)(params)

  rounded, exact = (gradients(params, jnp.asarray(x_BLD, dtype)) for dtype in (jnp.bfloat16, jnp.float32))
  for a, b in zip(jax.tree.leaves(rounded), jax.tree.leaves(exact), strict=True):
    a, b = np.ravel(a).astype(np.float64), np.ravel(b).astype(np.float64)
    assert np.linalg.norm(a - b) <= 0.1 * np.linalg.norm(b)
