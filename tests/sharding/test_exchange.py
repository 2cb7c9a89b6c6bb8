"""The plan of an exchange, and the primitive that CPUs lack, tested against its documentation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from moe_jax.sharding.exchange import make_plan, padded_index, ragged_arguments
from tests.sharding.cases import KINDS, assignment, check, compile_step


def emulated_ragged_all_to_all(
  operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name
):
  """`lax.ragged_all_to_all` by its documentation, from what all devices hold; NaN where receivers expect
  other sizes than are sent."""
  devices, me = lax.axis_size(axis_name), lax.axis_index(axis_name)
  everywhere = lambda x: lax.all_gather(x, axis_name)
  operand_P, start_P, size_P, there_P = map(everywhere, (operand, input_offsets, send_sizes, output_offsets))
  per_device = input_offsets.shape[0] // devices
  row = jnp.arange(operand.shape[0])
  for sender in range(devices):
    for j in range(per_device):
      i = me * per_device + j
      agreed = size_P[sender, i] == recv_sizes[sender * per_device + j]
      place = jnp.where(row < size_P[sender, i], there_P[sender, i] + row, output.shape[0])
      rows = operand_P[sender].at[start_P[sender, i] + row].get(mode="fill", fill_value=0)
      output = output.at[place].set(jnp.where(agreed, rows, jnp.nan), mode="drop")
  return output


@pytest.mark.parametrize("mesh", ["expert=2", "data=2,expert=4"])
def test_ragged_exchange_equals_the_loop(mesh, monkeypatch):
  """CPU lacks the primitive, so its documented meaning stands in; offsets, sizes and gradients are real."""
  monkeypatch.setattr(lax, "ragged_all_to_all", emulated_ragged_all_to_all)
  compiled = compile_step("dropless:exchange=ragged")
  for kind in KINDS:
    check("dropless:exchange=ragged", mesh, assignment(kind), run=lambda *_: compiled)


def simulate_ragged(operands, outputs, arguments):
  """What each device ends up with, by the documentation of `lax.ragged_all_to_all`; lists over devices."""
  devices = len(operands)
  results = [np.array(output) for output in outputs]
  for sender in range(devices):
    start, size, there, _ = arguments[sender]
    per_device = len(start) // devices
    for i, (s, n, t) in enumerate(zip(start, size, there)):
      receiver, j = divmod(i, per_device)
      assert arguments[receiver][3][sender * per_device + j] == n, "sizes sent and expected differ"
      results[receiver][t : t + n] = operands[sender][s : s + n]
  return results


@pytest.mark.parametrize("devices, experts", [(2, 1), (4, 3), (3, 4)])
def test_plans_against_a_simulation_of_the_primitive(devices, experts):
  r = np.random.default_rng(devices)
  counts_PPO = r.integers(0, 4, (devices, devices, experts)) * (r.random((devices, devices, experts)) < 0.7)
  counts_PPO[:, 0] = 0  # nothing for the first device
  counts_PPO[0] = 0  # and nothing from it
  counts_PPO[1, 1, 0] = 9
  counts_PPO = counts_PPO.astype(np.int32)
  plans = [jax.device_get(make_plan(jnp.asarray(counts_PPO), me)) for me in range(devices)]
  # rows are (receiver, expert, sender, number), which is also the order in which senders keep them
  cells = [(q, e) for q in range(devices) for e in range(experts)]
  row = lambda p: [(q, e, p, n) for q, e in cells for n in range(counts_PPO[p, q, e])]
  sent = [np.array(row(p), int).reshape(-1, 4) for p in range(devices)]
  room = int(counts_PPO.sum())
  empty = [np.full((room, 4), -1) for _ in range(devices)]
  arguments = [tuple(map(np.asarray, ragged_arguments(plan))) for plan in plans]
  got = simulate_ragged(sent, empty, arguments)
  for q in range(devices):
    mine = sorted(r for rows in sent for r in map(tuple, rows) if r[0] == q)  # by expert, sender, number
    assert [tuple(r) for r in got[q][: len(mine)]] == mine
    assert (got[q][len(mine) :] == -1).all()
  back = simulate_ragged(
    got, empty, [tuple(map(np.asarray, ragged_arguments(plan.back()))) for plan in plans]
  )
  for p in range(devices):
    np.testing.assert_array_equal(back[p][: len(sent[p])], sent[p])


def test_padded_index_lays_slices_end_to_end():
  start, size = jnp.array([[5, 0, 9], [3, 3, 3]]), jnp.array([[2, 0, 3], [0, 0, 0]])
  expected = [[5, 6, 9, 10, 11, 99], [99] * 6]
  np.testing.assert_array_equal(padded_index(start, size, 6, 99), expected)
