"""The ERC loss (2512.23447) against a loop over pairs of experts, in a layer and in a training step."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from moe_jax.errors import InputError
from moe_jax.nn import Context
from moe_jax.nn.ffn import CoupledMoE
from moe_jax.nn.ffn.erc_moe import erc_loss
from tests import tiny
from tests.nn.layer import randomized
from tests.reference.routing import finite_differences

D, E, F, ALPHA = 5, 4, 3, 0.7
ROUTER_DE = np.random.default_rng(0).normal(size=(D, E)).astype(np.float32)
W_EDF = np.random.default_rng(1).normal(size=(E, D, F)).astype(np.float32)


def loop(router_DE, w_EDF, key=None):
  columns = [router_DE[:, i].astype(float) for i in range(E)]
  if key is not None:
    draw_ED = np.asarray(jax.random.uniform(jax.random.fold_in(key, 1), (E, D), minval=-1.0), float)
    for i, column in enumerate([*columns]):
      others = [np.asarray(ROUTER_DE[:, j], float) for j in range(E) if j != i]  # the radius has no gradient
      own = np.asarray(ROUTER_DE[:, i], float)
      radius = min(np.linalg.norm(own - other) for other in others) / 2 / np.linalg.norm(own)
      columns[i] = column * (1 + radius * draw_ED[i])
  m = lambda i, j: np.linalg.norm(columns[i] @ w_EDF[j].astype(float))
  pairs = [(i, j) for i in range(E) for j in range(E) if i != j]
  excess = [max(0, m(i, j) - ALPHA * m(i, i)) + max(0, m(j, i) - ALPHA * m(i, i)) for i, j in pairs]
  return sum(excess) / E**2


@pytest.mark.parametrize("key", [None, jax.random.key(3)], ids=["evaluation", "training"])
def test_value_and_gradients_equal_the_loop(key):
  both = jax.jit(jax.value_and_grad(lambda r, w: erc_loss(r, w, ALPHA, key), argnums=(0, 1)))
  value, (d_router_DE, d_w_EDF) = both(ROUTER_DE, W_EDF)
  np.testing.assert_allclose(value, loop(ROUTER_DE, W_EDF, key), rtol=1e-5)
  of_router = finite_differences(lambda r: loop(r, W_EDF, key), ROUTER_DE)
  np.testing.assert_allclose(d_router_DE, of_router, rtol=1e-3, atol=1e-4)
  of_experts = finite_differences(lambda w: loop(ROUTER_DE, w, key), W_EDF)
  np.testing.assert_allclose(d_w_EDF, of_experts, rtol=1e-3, atol=1e-4)
  assert min(np.abs(d_router_DE).max(), np.abs(d_w_EDF).max()) > 0.1


def test_coupled_experts_have_no_loss_and_zeros_have_a_finite_gradient():
  """Expert i responds to the direction of column i only."""
  router_DE, w_EDF = np.eye(D, E, dtype=np.float32), np.zeros((E, D, F), np.float32)
  for e in range(E):
    w_EDF[e, e] = 1
  assert erc_loss(router_DE, w_EDF, 1.0, jax.random.key(0)) == 0
  gradient = jax.grad(lambda r: erc_loss(r, W_EDF, 1.0, jax.random.key(0)))(0 * ROUTER_DE)
  assert np.isfinite(gradient).all()


def make(**fields):
  fields = {"num_experts": E, "expert_dim": F, "weight": 2.0, "alpha": ALPHA} | fields
  return randomized(lambda: CoupledMoE(D, rngs=nnx.Rngs(0), **fields))


@pytest.mark.parametrize("experts", ["swiglu", "relu"])
def test_the_layer_adds_its_loss_to_those_of_its_balancer(experts):
  moe = make(experts=experts, balancer="z_loss:0.1")
  x_BLD = np.random.default_rng(2).normal(size=(2, 3, D)).astype(np.float32)
  _, aux = moe(x_BLD, Context(step_key=jax.random.key(1)))  # evaluation: nothing is drawn
  first = moe.experts.w_gate_EDF if experts == "swiglu" else moe.experts.w_up_EDF
  want = 2 * loop(np.asarray(moe.router.w_router_DE[...]), np.asarray(first[...]))
  np.testing.assert_allclose(aux.losses["erc_loss"], want, rtol=1e-5)
  assert aux.losses.keys() == {"z_loss", "erc_loss"}


@functools.cache
def one_step(**fields):
  config = tiny.change(tiny.CONFIG, ffn="erc_moe:weight=0.5", num_layers=1, dispatcher="dropless", **fields)
  return tiny.one_step(config, tiny.make_batch())


def test_a_step_has_the_loss_once_however_it_is_cut():
  tiny.assert_same(one_step(accumulation=2), one_step())
  assert one_step()["metrics"]["erc_loss"].shape == (1,) and one_step()["metrics"]["erc_loss"] > 0.01


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"weight": -1.0}, "weight must be 0 or more, got -1.0"),
    ({"router": "task_level"}, "the router has no matrix with a column per expert"),
    ({"experts": "expert_dropout"}, "the network of experts has no w_gate_EDF or w_up_EDF"),
  ],
)
def test_what_it_cannot_couple_is_an_error(fields, message):
  with pytest.raises(InputError, match=message):
    make(**fields)
