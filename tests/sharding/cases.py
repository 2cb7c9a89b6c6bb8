"""Assignments, meshes and the slow loop that every dispatcher is compared with."""

import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import sharding
from moe_jax.config import MeshConfig
from moe_jax.ops.dispatch import weighing_inputs
from moe_jax.ops.experts import gated_experts
from moe_jax.sharding.dispatchers import make_dispatcher
from moe_jax.types import Assignment
from tests.reference.moe_layer import moe_layer

G, T, K, E, D, F = 16, 4, 2, 8, 8, 8
CAPACITY = 2

MESHES = {
  "1": {"data": 1},
  "data=2": {"data": 2},
  "expert=2": {"data": 1, "expert": 2},
  "data=2,expert=2": {"data": 2, "expert": 2},
  "expert=8": {"data": 1, "expert": 8},
  "data=2,expert=4": {"data": 2, "expert": 4},
  "fsdp=2,expert=2,tensor=2": {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2},
  "slice=2,fsdp=2,tensor=2": {"slice": 2, "data": 1, "fsdp": 2, "tensor": 2},
}
SPECS = ("einsum", "sorted", "dropless", "all_to_all", "all_gather")


def assignment(kind: str, seed: int = 0) -> Assignment:
  """Token choice, top-2, in choice-major order; `kind` says who is chosen and who counts."""
  r = np.random.default_rng(seed)
  popularity = np.where(np.arange(E) < 2, 8.0, 1.0) if kind in ("uneven", "skipped") else np.ones(E)
  if kind == "empty_experts":  # nothing for the first half of the experts, and of the devices
    popularity[: E // 2] = 1e-9
  noise = r.gumbel(size=(G, T, E)) + np.log(popularity)
  expert_GKT = np.argsort(-noise, axis=-1)[..., :K].swapaxes(1, 2)
  if kind == "one_expert":
    expert_GKT = np.full_like(expert_GKT, E - 1)
  p_valid = {"nothing": 0.0, "uneven": 0.8, "skipped": 0.6}.get(kind, 1.0)
  valid = r.random((G, K, T)) < p_valid
  valid &= (np.arange(T) < T - 1) | (np.arange(G)[:, None, None] % 3 > 0)  # every third group ends in padding
  flat = lambda x, dtype: jnp.asarray(x.reshape(G, K * T), dtype)
  return Assignment(
    token_A=flat(np.broadcast_to(np.arange(T), (G, K, T)), jnp.int32),
    expert_A=flat(expert_GKT, jnp.int32),
    weight_A=flat(r.random((G, K, T)), jnp.float32),
    valid_A=flat(valid, bool),
    holds_slot_A=flat(valid | (r.random((G, K, T)) < 0.5), bool) if kind == "skipped" else flat(valid, bool),
  )


KINDS = ("even", "uneven", "empty_experts", "one_expert", "skipped", "nothing")


@functools.cache
def inputs(dtype=jnp.float32):
  """x_GTD, the cotangent of y_GTD, and the experts."""
  draw = lambda i, *shape: 0.5 * jax.random.normal(jax.random.key(i), shape).astype(dtype)
  experts = gated_experts(draw(2, E, D, F), draw(3, E, D, F), draw(4, E, F, D))
  return 2 * draw(0, G, T, D), 2 * draw(1, G, T, D), experts


def collectives(program: str) -> Counter:
  """How many of each kind a compiled program's text has."""
  names = "all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute"
  return Counter(re.findall(rf"= .*? ({names})(?:-start)?\(", program))


def mesh_of(name: str) -> jax.sharding.Mesh:
  return sharding.make_mesh(MeshConfig(**MESHES[name]))


def compile_step(spec, weighs="output"):
  dispatch = make_dispatcher(spec).dispatch
  dispatch = dispatch if weighs == "output" else weighing_inputs(dispatch, D)
  dispatch = functools.partial(dispatch, num_experts=E, capacity=CAPACITY, shard=sharding.constrain)

  def loss(x, combine, experts, assignment, cotangent):
    y, kept = dispatch(x, assignment._replace(weight_A=combine), experts)
    return jnp.vdot(y, cotangent), (y, kept)

  return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))


@functools.cache
def step(spec: str, mesh: str, weighs: str):
  """(x, combine weights, experts, assignment, cotangent) -> (gradients of the first three, (y, kept))."""
  return compile_step(spec, weighs)


def check(spec, mesh, assignment, expected_valid=None, run=step, weighs="output"):
  """Asserts the loop's values, drops and gradients. `expected_valid`: the entries that are kept, where it is
  not for the loop's own capacity to say."""
  x, cotangent, experts = inputs()
  with jax.set_mesh(mesh_of(mesh)):
    gradients, (y, kept) = run(spec, mesh, weighs)(x, assignment.weight_A, experts, assignment, cotangent)
  capacity = None if make_dispatcher(spec).never_drops else CAPACITY
  oracle = assignment
  if expected_valid is not None:
    oracle, capacity = assignment._replace(valid_A=expected_valid), None
  y_ref, kept_ref, ref = moe_layer(x, oracle, experts.weights, capacity, cotangent, weighs)
  np.testing.assert_array_equal(kept, kept_ref)
  np.testing.assert_allclose(y, y_ref, atol=1e-5)
  found = (*gradients[:2], *gradients[2].weights)
  for name, got in zip(("x", "weight", "gate", "up", "down"), found, strict=True):
    np.testing.assert_allclose(got, ref[name], atol=5e-5, err_msg=f"gradient of {name}")
