"""The dispatchers against a numpy loop, values and gradients, and the laws of capacity."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.dispatch import (
  default_group_size,
  dropless_dispatch,
  einsum_dispatch,
  expert_capacity,
  sorted_dispatch,
  weighing_inputs,
)
from moe_jax.ops.experts import Experts, gated_experts
from moe_jax.types import Assignment
from tests.reference.moe_layer import kept_entries, moe_layer

D, F = 6, 8
ENTRIES = 37  # every case is padded to this many, so that one compiled program serves them all
UNDER_TEST = {
  "einsum": einsum_dispatch,
  "sorted": sorted_dispatch,
  "dropless": dropless_dispatch,
  # with any `shard`, `sorted` takes the form that devices can exchange
  "buffers": functools.partial(sorted_dispatch, shard=lambda x, axes: x),
}
NAMES = sorted(UNDER_TEST)


def make_weights(num_experts, gated=True, seed=0, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(seed), 3)
  e = num_experts
  gate, up, down = (jax.random.normal(k, s) * 0.4 for k, s in zip(keys, [(e, D, F), (e, D, F), (e, F, D)]))
  gate, up, down = (w.astype(dtype) for w in (gate, up, down))
  if gated:
    return gated_experts(gate, up, down)
  axes = ("expert", "embed", "mlp"), ("expert", "mlp", "embed")
  relu = lambda weights, rows, product: product.ffn(jax.nn.relu, rows, weights[:1], weights[1])
  return Experts((up, down), axes, relu)


def token_choice(groups, tokens, experts, k, seed=0, choice_major=False, p_valid=1.0, holds=False):
  """Every token takes k different experts at random; leaves some entries out."""
  r = np.random.RandomState(seed)
  expert_GTK = np.array([[r.permutation(experts)[:k] for _ in range(tokens)] for _ in range(groups)])
  token_GTK = np.broadcast_to(np.arange(tokens)[:, None], (groups, tokens, k))
  if choice_major:
    expert_GTK, token_GTK = expert_GTK.swapaxes(1, 2), token_GTK.swapaxes(1, 2)
  valid_GA = r.rand(groups, tokens * k) < p_valid
  return Assignment(
    token_A=jnp.asarray(token_GTK.reshape(groups, -1), jnp.int32),
    expert_A=jnp.asarray(expert_GTK.reshape(groups, -1), jnp.int32),
    weight_A=jnp.asarray(r.rand(groups, tokens * k), jnp.float32),
    valid_A=jnp.asarray(valid_GA),
    holds_slot_A=jnp.asarray(valid_GA | (r.rand(*valid_GA.shape) < 0.5)) if holds else None,
  )


def arbitrary(groups, tokens, experts, entries, seed=0):
  """Entries in any order: some tokens many times, some never, A no multiple of T. Pairs are unique."""
  r = np.random.RandomState(seed)
  pairs = np.array([r.permutation(tokens * experts)[:entries] for _ in range(groups)])
  return Assignment(
    token_A=jnp.asarray(pairs // experts, jnp.int32),
    expert_A=jnp.asarray(pairs % experts, jnp.int32),
    weight_A=jnp.asarray(r.randn(groups, entries), jnp.float32),
    valid_A=jnp.asarray(r.rand(groups, entries) < 0.8),
  )


def all_on_one(groups, tokens, experts):
  full = token_choice(groups, tokens, experts, 1)
  return full._replace(expert_A=jnp.full_like(full.expert_A, experts - 1))


def padded(assignment):
  """Adds invalid entries up to A = ENTRIES, and spells holds_slot_A out."""
  holds = assignment.valid_A if assignment.holds_slot_A is None else assignment.holds_slot_A
  more = ENTRIES - assignment.valid_A.shape[1]
  return jax.tree.map(lambda f: jnp.pad(f, ((0, 0), (0, more))), assignment._replace(holds_slot_A=holds))


def tokens_like(groups, tokens, seed=1, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(seed), 2)
  return [jax.random.normal(k, (groups, tokens, D)).astype(dtype) for k in keys]


@functools.cache
def step(name: str, num_experts: int, capacity: int, weighs: str = "output") -> Callable:
  """(x, combine weights, expert weights, assignment, cotangent) -> y, kept, gradients of the first three."""
  dispatch = UNDER_TEST[name] if weighs == "output" else weighing_inputs(UNDER_TEST[name], D)

  def loss(x, combine, experts, assignment, cotangent):
    assignment = assignment._replace(weight_A=combine)
    y, kept = dispatch(x, assignment, experts, num_experts=num_experts, capacity=capacity)
    return jnp.vdot(y.astype(jnp.float32), cotangent.astype(jnp.float32)), (y, kept)

  return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))


def run(name, x, assignment, experts, capacity, cotangent, weighs="output"):
  grads, (y, kept) = step(name, experts.num_experts, 0 if name == "dropless" else capacity, weighs)(
    x, assignment.weight_A, experts, assignment, cotangent
  )
  names = ("gate", "up", "down")[-len(experts.weights) :]
  return y, kept, {"x": grads[0], "weight": grads[1], **dict(zip(names, grads[2].weights, strict=True))}


def check(name, x, assignment, experts, capacity, cotangent, atol=2e-5, weighs="output"):
  """Asserts that the dispatcher gives the reference's values, drops and gradients; returns its own."""
  y, kept, grads = run(name, x, assignment, experts, capacity, cotangent, weighs)
  weights = (None, *experts.weights)[-3:]
  y_ref, kept_ref, grads_ref = moe_layer(
    x, assignment, weights, None if name == "dropless" else capacity, cotangent, weighs
  )
  np.testing.assert_array_equal(kept, kept_ref)
  assert y.dtype == x.dtype
  np.testing.assert_allclose(y.astype(jnp.float32), y_ref, atol=atol)
  for key, want in grads_ref.items():
    if want is not None:
      np.testing.assert_allclose(
        grads[key].astype(jnp.float32), want, atol=atol * 4, err_msg=f"gradient of {key}"
      )
  return y, kept, grads


CASES = {
  "token_major": (token_choice(2, 8, 4, 2), 4),
  "choice_major_masked": (token_choice(2, 8, 4, 2, choice_major=True, p_valid=0.7), 4),
  "skipped_entries_hold_slots": (token_choice(2, 8, 4, 2, choice_major=True, p_valid=0.6, holds=True), 4),
  "any_order_and_count": (arbitrary(2, 8, 4, 19), 4),
  "all_on_one_expert": (all_on_one(2, 8, 4), 4),
  "one_expert": (token_choice(2, 8, 1, 1), 1),
  "every_expert": (token_choice(2, 8, 4, 4), 4),
  "no_valid_entry": (token_choice(2, 8, 4, 2, p_valid=0.0), 4),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_loop_with_and_without_drops(name, case):
  assignment, experts = CASES[case]
  x, cotangent = tokens_like(2, 8)
  for capacity in (3,) if experts == 1 else (3, 16):
    check(name, x, padded(assignment), make_weights(experts), capacity, cotangent)


@pytest.mark.parametrize("name", NAMES)
def test_weights_on_the_inputs_equal_the_loop(name):
  x, cotangent = tokens_like(2, 8)
  for case in ("token_major", "skipped_entries_hold_slots", "any_order_and_count", "no_valid_entry"):
    for capacity in (3, 16):
      check(name, x, padded(CASES[case][0]), make_weights(4), capacity, cotangent, weighs="input")
  rounded, cotangent = tokens_like(2, 8, dtype=jnp.bfloat16)
  weights = make_weights(4, dtype=jnp.bfloat16)
  check(name, rounded, padded(CASES["token_major"][0]), weights, 3, cotangent, atol=0.06, weighs="input")


@pytest.mark.parametrize("name", NAMES)
def test_without_holds_slot_valid_entries_hold_one(name):
  x, cotangent = tokens_like(2, 8)
  check(name, x, CASES["choice_major_masked"][0], make_weights(4), 3, cotangent)


@pytest.mark.parametrize("name", NAMES)
def test_relu_experts(name):
  x, cotangent = tokens_like(2, 8)
  check(name, x, padded(CASES["token_major"][0]), make_weights(4, gated=False), 3, cotangent)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_rows_and_float32_combine_weights(name):
  x, cotangent = tokens_like(2, 8, dtype=jnp.bfloat16)
  weights = make_weights(4, dtype=jnp.bfloat16)
  check(name, x, padded(CASES["any_order_and_count"][0]), weights, 3, cotangent, atol=0.06)


def test_cases_drop_where_they_should():
  dropped = {case: (a.valid_A & ~kept_entries(a, 3)).sum() for case, (a, _) in CASES.items()}
  assert all(n > 0 for case, n in dropped.items() if case != "no_valid_entry"), dropped


@pytest.mark.parametrize("name", ["einsum", "sorted", "buffers"])
def test_drops_the_last_entries_of_the_queue_to_exactly_zero(name):
  x, cotangent = tokens_like(2, 8)
  y, kept, grads = run(name, x, padded(all_on_one(2, 8, 4)), make_weights(4), 3, cotangent)
  np.testing.assert_array_equal(kept[0], np.arange(ENTRIES) < 3)
  for got in (y[0, 3:], grads["x"][0, 3:], grads["weight"][0, 3:], grads["up"][:3]):
    assert not np.any(got)
  assert np.all(np.any(y[0, :3], axis=-1))


@pytest.mark.parametrize("name", ["einsum", "sorted", "buffers"])
def test_invalid_entries_take_no_slot_unless_they_hold_one(name):
  x, cotangent = tokens_like(2, 8)
  a = all_on_one(2, 8, 4)
  a = a._replace(valid_A=a.valid_A.at[:, :2].set(False))
  _, kept, _ = run(name, x, padded(a), make_weights(4), 3, cotangent)
  np.testing.assert_array_equal(np.nonzero(kept[0])[0], [2, 3, 4])
  a = a._replace(holds_slot_A=jnp.ones_like(a.valid_A))
  _, kept, _ = run(name, x, padded(a), make_weights(4), 3, cotangent)
  np.testing.assert_array_equal(np.nonzero(kept[0])[0], [2])


@pytest.mark.parametrize("name", NAMES)
def test_huge_padding_reaches_nothing(name):
  x, cotangent = tokens_like(2, 8)
  a = token_choice(2, 8, 4, 2)
  a = padded(a._replace(valid_A=a.token_A != 0))
  _, _, clean = run(name, x, a, make_weights(4), 3, cotangent)
  y, _, grads = run(name, x.at[0, 0].set(1e30), a, make_weights(4), 3, cotangent)
  assert np.all(np.isfinite(y)) and not np.any(y[0, 0])
  np.testing.assert_array_equal(grads["up"], clean["up"])


@pytest.mark.parametrize("name", NAMES)
def test_permuting_tokens_permutes_outputs(name):
  x, cotangent = tokens_like(2, 8)
  a = padded(CASES["any_order_and_count"][0])
  y, _, _ = run(name, x, a, make_weights(4), 16, cotangent)
  order = np.random.RandomState(3).permutation(8)
  moved = a._replace(token_A=jnp.asarray(np.argsort(order), jnp.int32)[a.token_A])
  y_moved, _, _ = run(name, x[:, order], moved, make_weights(4), 16, cotangent)
  np.testing.assert_allclose(y_moved, y[:, order], atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_groups_are_independent(name):
  x, cotangent = tokens_like(2, 8)
  a = padded(CASES["token_major"][0])
  y, kept, _ = run(name, x, a, make_weights(4), 3, cotangent)
  for g in range(2):
    one = jax.tree.map(lambda f, g=g: f[g : g + 1], a)
    y_one, kept_one, _ = run(name, x[g : g + 1], one, make_weights(4), 3, cotangent[g : g + 1])
    np.testing.assert_allclose(y_one[0], y[g], atol=1e-6)
    np.testing.assert_array_equal(kept_one[0], kept[g])


@pytest.mark.parametrize(
  ("tokens", "k", "factor", "experts", "want"),
  [
    (8, 2, 1.0, 4, 4),
    (8, 2, 1.25, 4, 5),
    (8, 1, 1.0, 3, 3),  # 2.67
    (10, 1, 1.1, 1, 11),  # 10*1.1 is 11.000000000000002
    (10, 1, 0.1 + 0.2, 1, 3),  # 0.30000000000000004
    (3, 1, 1 / 3, 1, 1),
    (4096, 2, 1.25, 16, 640),
    (100, 1, 1.001, 1, 101),  # really above 100
    (4, 1, 0.01, 8, 1),  # never 0
    (1 << 20, 8, 1.1, 256, 36045),  # 36044.8
  ],
)
def test_expert_capacity(tokens, k, factor, experts, want):
  assert expert_capacity(tokens, k, factor, experts) == want


def test_default_group_size_divides_the_sequence():
  lengths = (64, 128, 256, 1000, 131, 4096)
  assert [default_group_size(True, n) for n in lengths] == [64, 128, 128, 200, 131, 128]
  assert default_group_size(False, 1000) == 1000
