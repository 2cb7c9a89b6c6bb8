"""Layers whose routers make one decision for many tokens: by task, and by sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.errors import InputError
from moe_jax.nn import MoE
from moe_jax.nn.context import Context


def layer(router, **fields):
  sizes = {"num_experts": 4, "num_experts_per_token": 2, "expert_dim": 8}
  return MoE(8, router=router, dispatcher="dropless", rngs=nnx.Rngs(0), **sizes, **fields)


def test_a_task_has_its_own_experts_and_its_row_learns():
  moe = layer("task_level:3")
  rows_SE = np.float32([[3, 2, 0, 0], [0, 0, 3, 2], [0, 3, 2, 0]])
  moe.router.w_task_SE.set_value(jnp.asarray(rows_SE))
  x_BLD = jax.random.normal(jax.random.key(0), (3, 5, 8))
  context = Context(domain_B=jnp.array([1, 0, 1], jnp.int32), num_domains=3)
  graphdef, state = nnx.split(moe)

  def forward(state):
    y_BLD, aux = nnx.merge(graphdef, state)(x_BLD, context)
    return jnp.sum(y_BLD**2), aux.tokens_per_expert_BE

  (_, counts_BE), gradient = jax.jit(jax.value_and_grad(forward, has_aux=True))(state)
  np.testing.assert_array_equal(counts_BE, 5 * np.array([[0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]]))
  d_rows_SE = np.asarray(gradient["router"]["w_task_SE"].get_value())
  assert np.abs(d_rows_SE[0, :2]).min() > 0 and np.abs(d_rows_SE[1, 2:]).min() > 0
  np.testing.assert_array_equal(d_rows_SE[2], 0)
  with pytest.raises(InputError, match="reads the domain of each sequence"):
    moe(x_BLD)


def test_sequences_of_a_group_are_routed_each_on_its_own():
  x_BLD = jax.random.normal(jax.random.key(0), (4, 6, 8))
  mask_BL = np.arange(6)[None] < np.array([[6], [4], [1], [0]])
  layers = [layer("sequence_level", group_size=size) for size in (0, 12)]
  run = jax.jit(lambda x_BLD, mask_BL: [moe(x_BLD, Context(mask_BL=mask_BL))[0] for moe in layers])
  alone, together = run(x_BLD, mask_BL)
  assert np.abs(alone).max() > 0.01
  np.testing.assert_allclose(together, alone, atol=1e-6)
  with pytest.raises(InputError, match="multiple of sequence_length=6"):
    layer("sequence_level", group_size=3)(x_BLD)
