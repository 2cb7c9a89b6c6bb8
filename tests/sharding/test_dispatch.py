"""Dispatchers that write out their exchange, compared with slow loops on every mesh; drops; invalid options."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import InputError
from moe_jax.sharding.dispatchers import DISPATCHERS, make_dispatcher
from tests.reference.moe_layer import kept_entries, moe_layer
from tests.sharding.cases import CAPACITY, KINDS, MESHES, SPECS, E, G, assignment, check, inputs, mesh_of


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("spec", SPECS)
def test_equals_the_loop_on_every_mesh(spec, mesh):
  for kind in KINDS:
    check(spec, mesh, assignment(kind))


@pytest.mark.parametrize("spec", SPECS)
def test_weights_on_the_inputs_equal_the_loop(spec):
  for kind in ("uneven", "skipped"):
    check(spec, "data=2,expert=4", assignment(kind), weighs="input")


@pytest.mark.parametrize(
  ("spec", "mesh"),
  [
    ("dropless:chunks=2", "expert=2"),
    ("dropless:chunks=3", "data=2,expert=4"),  # 16 entries on a device: the last chunk is filled up
    ("all_to_all:chunks=2", "data=2,expert=4"),  # cut between a device's two groups: bounded by their slots
    ("all_gather:capacity=group", "data=2,expert=4"),
  ],
)
def test_chunks_and_capacity_change_no_number(spec, mesh):
  for kind in ("uneven", "one_expert", "skipped"):
    check(spec, mesh, assignment(kind))


def _merged(assignment, share):
  """The lists of every `share` groups as one."""
  return jax.tree.map(lambda f: np.asarray(f).reshape(G // share, -1), assignment)


@pytest.mark.parametrize(
  ("spec", "share"),
  [
    ("all_to_all:capacity=device:chunks=2", 2),  # the first chunk's groups may take the slots of all
    ("all_to_all:capacity=global", 8),
    ("all_gather:capacity=device", 2),
    ("all_gather:capacity=global", 8),
  ],
)
def test_shared_capacity_against_a_loop(spec, share):
  """16 groups on data=2 x expert=4: two on each device, eight in each expert group."""
  for kind in ("uneven", "skipped", "one_expert"):
    given = assignment(kind)
    kept = kept_entries(_merged(given, share), CAPACITY * share).reshape(G, -1)
    assert kept.sum() < given.valid_A.sum()
    if kind != "one_expert":
      assert kept.sum() > kept_entries(given, CAPACITY).sum()  # sharing keeps more
    check(spec, "data=2,expert=4", given, expected_valid=kept)


@pytest.mark.parametrize(("factor", "rows"), [(1, 4), (1.05, 5)])
def test_a_bounded_buffer_is_rounded_up_and_drops_what_comes_last(factor, rows):
  """Two groups of 8 entries on a device, 4 devices: 4 * factor rows from each to each, and no part of a row."""
  given = assignment("uneven")
  devices = given._replace(expert_A=given.expert_A // (E // 4), holds_slot_A=None)
  kept = kept_entries(_merged(devices, 2), rows).reshape(G, -1)
  assert kept_entries(_merged(devices, 2), rows - 1).sum() < kept.sum() < given.valid_A.sum()
  check(f"dropless:buffer_factor={factor}", "data=2,expert=4", given, expected_valid=kept)


@pytest.mark.parametrize("spec", ["dropless", "all_gather"])
def test_bfloat16(spec):
  x, cotangent, experts = inputs(jnp.bfloat16)
  given = assignment("uneven")
  with jax.set_mesh(mesh_of("expert=2")):
    dispatch = functools.partial(make_dispatcher(spec).dispatch, num_experts=E, capacity=0)
    y, _ = jax.jit(dispatch)(x, given, experts)
  assert y.dtype == jnp.bfloat16
  exact, _, _ = moe_layer(x, given, experts.weights, None, cotangent)
  np.testing.assert_allclose(y.astype(jnp.float32), exact, atol=0.02 * np.abs(exact).max())


@pytest.mark.parametrize(
  ("spec", "message"),
  [
    ("dropples", "unknown dispatcher 'dropples': did you mean dropless"),
    ("dropless:chunks=0", "chunks must be 1 or more, got 0"),
    ("dropless:buffer_factor=-1", "buffer_factor must be 0 .* got -1"),
    ("all_to_all:capacity=node", "capacity must be one of none, group, device, global, got 'node'"),
    ("all_to_all:exchange=rdma", "exchange must be one of auto, ragged, padded"),
    ("sorted:chunks=2", "sorted:chunks=2"),
  ],
)
def test_a_wrong_dispatcher_is_one_line(spec, message):
  with pytest.raises(InputError, match=message):
    make_dispatcher(spec)


def test_a_mesh_that_does_not_divide():
  x, _, experts = inputs()
  given = assignment("even")
  dispatch = functools.partial(make_dispatcher("dropless").dispatch, num_experts=E, capacity=0)
  with jax.set_mesh(mesh_of("expert=8")):
    with pytest.raises(InputError, match="12 routing groups: the 8 devices"):
      dispatch(x[:12], jax.tree.map(lambda f: f[:12], given), experts)
    fewer = jax.tree.map(lambda w: w[:6], experts)
    with pytest.raises(InputError, match=r"--num_experts=6: .*--expert_parallelism=8"):
      dispatch(x, given, fewer)


def test_who_never_drops():
  never = {spec for spec in DISPATCHERS if make_dispatcher(spec).never_drops}
  assert never == {"dropless", "all_gather"}
  assert make_dispatcher("all_to_all:capacity=none").never_drops
  assert not make_dispatcher("dropless:buffer_factor=1.5").never_drops
  assert not make_dispatcher("all_gather:capacity=global").never_drops
