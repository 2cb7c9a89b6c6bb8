"""The laws that every router obeys, one row of `router_rows.ROWS` per router."""

import jax
import numpy as np
import pytest

from moe_jax.errors import InputError
from moe_jax.ops.routing import CHOICES
from moe_jax.ops.routing.common import in_groups
from moe_jax.types import RouterContext
from tests.ops.choosing import route, routing_of
from tests.ops.router_laws import (
  MASK_T,
  assert_same_entries,
  bias_of,
  choice_of,
  choices,
  columns_of,
  entries_of,
  kept,
  key_of,
  logits_of,
  loop,
  route_eagerly,
  route_row,
  step_of,
)
from tests.ops.router_row import T
from tests.ops.router_rows import ROWS
from tests.reference import routing as reference


def rows_that(condition=lambda row: True):
  chosen = {name: row for name, row in ROWS.items() if condition(row)}
  return pytest.mark.parametrize("row", chosen.values(), ids=chosen)


every_router = rows_that()


def test_every_router_has_a_row():
  assert {row.spec.split(":")[0] for row in ROWS.values()} == CHOICES.builtin


# --- laws ---


@every_router
@pytest.mark.parametrize("with_bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("with_mask", [False, True], ids=["no_mask", "mask"])
def test_equals_the_loop(row, with_bias, with_mask):
  bias_E = bias_of(row) if with_bias else None
  mask = MASK_T if with_mask else None
  for seed in range(3):
    logits_TE, kwargs = logits_of(row, seed), {"bias_E": bias_E, "key": key_of(row, seed), "mask": mask}
    routing = route_row(row, logits_TE, seed=seed, **kwargs)
    assert_same_entries(entries_of(routing.assignment), loop(row, logits_TE, seed=seed, **kwargs))
    np.testing.assert_array_equal(routing.mask_T, np.ones(T, bool) if mask is None else mask)
    if with_mask or row.score is None:
      continue
    np.testing.assert_array_equal(routing.logits_TE, logits_TE)
    want_TE = [row.score(x) for x in logits_TE.astype(float)]
    np.testing.assert_allclose(np.exp(routing.log_scores_TE), want_TE, rtol=1e-5)


@every_router
def test_numbers_of_64_bits_elsewhere_change_nothing(row):
  """A user's program may have them (JAX_ENABLE_X64), and draws and counts must not follow it."""
  logits_TE, kwargs = logits_of(row), {"bias_E": bias_of(row), "key": key_of(row), "mask": MASK_T}
  want = route_eagerly(row, logits_TE, **kwargs)
  with jax.enable_x64(True):
    found = route_eagerly(row, logits_TE, **kwargs)
  assert_same_entries(entries_of(found.assignment), entries_of(want.assignment))


@rows_that(lambda row: row.exact_ties)
def test_ties_go_to_the_lower_index(row):
  logits_TE = np.random.default_rng(1).integers(0, 2, (T, columns_of(row))).astype(np.float32)
  logits_TE[0] = 0
  want = loop(row, logits_TE)
  mine = [(e.token, e.expert) for e in entries_of(route_row(row, logits_TE, key=key_of(row)).assignment)]
  assert mine == [(e.token, e.expert) for e in want]


@every_router
def test_dtypes_and_static_length(row):
  routing = route_row(row, logits_of(row), key=key_of(row))
  a = routing.assignment
  assert [x.dtype for x in a[:4]] == [np.int32, np.int32, np.float32, np.bool_]
  assert all(x.shape == (step_of(row).num_entries,) for x in a if x is not None)
  assert routing.log_scores_TE.dtype == routing.logits_TE.dtype == np.float32


@every_router
def test_gradient_equals_finite_differences_of_the_loop(row):
  logits_TE, bias_E, key, mask = logits_of(row), bias_of(row), key_of(row), MASK_T
  kwargs = {"bias_E": bias_E, "key": key, "mask": mask}
  valid_A = [e.valid for e in loop(row, logits_TE, **kwargs)]
  c_A = np.random.default_rng(1).normal(size=len(valid_A)).astype(np.float32) * valid_A

  def loss(logits_TE):
    entries = loop(row, logits_TE, **kwargs)
    return sum(float(c) * e.weight for c, e in zip(c_A, entries, strict=True))

  _, (d_logits_TE, d_bias_E) = step_of(row)(logits_TE, bias_E=bias_E, key=key, mask=mask, c_A=c_A)
  np.testing.assert_allclose(d_logits_TE, reference.finite_differences(loss, logits_TE), atol=1e-5)
  if row.takes_bias:
    np.testing.assert_array_equal(d_bias_E, 0)
  if row.differentiable:
    assert np.abs(d_logits_TE[MASK_T]).max() > 0.01  # a gradient of zero would prove nothing
  np.testing.assert_array_equal(d_logits_TE[~MASK_T], 0)


@rows_that(lambda row: row.permutable)
def test_permuting_experts_permutes_the_choices(row):
  logits_TE, bias_E = logits_of(row), bias_of(row)
  key = None if row.draws_per_expert else key_of(row)
  order = np.random.default_rng(2).permutation(columns_of(row))
  before = choices(route_row(row, logits_TE, bias_E=bias_E, key=key).assignment)
  permuted_E = None if bias_E is None else bias_E[order]
  after = choices(route_row(row, logits_TE[:, order], bias_E=permuted_E, key=key).assignment)
  after = {(t, int(order[e])): weight for (t, e), weight in after.items()}
  assert after.keys() == before.keys()
  np.testing.assert_allclose([after[pair] for pair in before], list(before.values()), rtol=1e-5)


@every_router
def test_masked_tokens_are_never_valid_and_change_nothing(row):
  logits_TE, bias_E, key = logits_of(row), bias_of(row), key_of(row)
  entries = entries_of(route_row(row, logits_TE, bias_E=bias_E, key=key, mask=MASK_T).assignment)
  for e in entries:
    assert MASK_T[e.token] or not (e.valid or e.holds_slot)
  huge_TE = np.where(MASK_T[:, None], logits_TE, np.float32(1e30) * np.sign(logits_TE))
  others = route_row(row, huge_TE, bias_E=bias_E, key=key, mask=MASK_T)
  assert_same_entries(entries_of(others.assignment), entries)
  nobody = route_row(row, logits_TE, bias_E=bias_E, key=key, mask=np.zeros(T, bool))
  assert not choices(nobody.assignment)


@rows_that(lambda row: row.takes_bias and not row.shift_matters)
def test_a_constant_bias_changes_nothing(row):
  logits_TE, key = logits_of(row), key_of(row)
  plain = route_row(row, logits_TE, key=key)
  shifted = route_row(row, logits_TE, bias_E=np.full(columns_of(row), 0.25, np.float32), key=key)
  assert_same_entries(entries_of(shifted.assignment), entries_of(plain.assignment))
  np.testing.assert_array_equal(shifted.log_scores_TE, plain.log_scores_TE)


@rows_that(lambda row: row.takes_bias and row.bias_decides)
def test_bias_moves_the_choice_and_never_a_weight(row):
  logits_TE, last = logits_of(row), columns_of(row) - 1
  bias_E = np.zeros(columns_of(row), np.float32)
  bias_E[last] = 10
  plain = route_row(row, logits_TE, mask=MASK_T)
  biased = route_row(row, logits_TE, bias_E=bias_E, mask=MASK_T)
  np.testing.assert_array_equal(biased.log_scores_TE, plain.log_scores_TE)
  before, after = choices(plain.assignment), choices(biased.assignment)
  experts_of = lambda found, t: {e for token, e in found if token == t}
  moved = 0
  for t in np.flatnonzero(MASK_T):
    assert last in experts_of(after, t)
    if experts_of(after, t) == experts_of(before, t):
      for e in experts_of(after, t):
        np.testing.assert_allclose(after[t, e], before[t, e], rtol=1e-6)
    else:
      moved += 1
  assert (moved > 0) == (row.k < row.num_experts)
  if row.own_weights:  # then they are those without a bias, also where the choice moved
    for pair, weight in after.items():
      np.testing.assert_allclose(weight, np.exp(plain.log_scores_TE[pair]), rtol=1e-6)


@pytest.mark.parametrize(
  "name", ["gshard_top2", "noisy_topk", "hierarchical_topk", "hierarchical_without_noise"]
)
def test_weights_sum_to_one(name):
  row = ROWS[name]
  key = key_of(row) if row.draws_per_expert else None  # otherwise the key says what is not sent
  weights = choices(route_row(row, logits_of(row), key=key).assignment)
  sums_T = [sum(w for (t, _), w in weights.items() if t == token) for token in range(T)]
  np.testing.assert_allclose(sums_T, 1, rtol=1e-6)


@every_router
def test_jit_equals_no_jit_and_traces_once(row):
  step, traces = step_of(row), set()
  for seed in range(2):
    logits_TE, key = logits_of(row, seed), key_of(row, seed)
    routing, _ = step(logits_TE, key=key, seed=seed)
    traces.add(step.traces)
    eager = route_eagerly(row, logits_TE, seed, key=key)
    assert_same_entries(entries_of(routing.assignment), entries_of(eager.assignment))
    np.testing.assert_array_equal(eager.mask_T, True)
  step(logits_of(row, 2), bias_E=bias_of(row), key=key_of(row, 2), mask=MASK_T)
  traces.add(step.traces)
  assert len(traces) == 1 and traces.pop() > 0  # other values never compile again


@every_router
def test_groups_are_routed_each_on_its_own(row):
  groups = range(3)
  logits_GTE = np.stack([logits_of(row, g) for g in groups])
  more_logits = [np.stack(arrays) for arrays in zip(*map(row.more_logits, groups))]
  of_groups = [RouterContext(np.roll(MASK_T, g), bias_of(row), **row.context(g)) for g in groups]
  context = jax.tree.map(lambda *leaves: np.stack(leaves), *of_groups)
  keys = jax.random.split(jax.random.key(5), len(groups)) if row.draw else None
  context = context._replace(bias_E=bias_of(row), key=keys, train=row.train)
  together = jax.jit(lambda logits: in_groups(choice_of(row).choose, logits, *more_logits, context=context))
  got = routing_of(together(logits_GTE))
  for g in groups:
    key = keys[g] if row.draw else None
    alone = route_row(row, logits_GTE[g], bias_E=bias_of(row), key=key, mask=np.roll(MASK_T, g), seed=g)
    of_group = jax.tree.map(lambda x, g=g: np.asarray(x)[g], got)
    assert_same_entries(entries_of(of_group.assignment), entries_of(alone.assignment))


@every_router
def test_nothing_is_drawn_without_a_key_and_other_keys_draw_otherwise(row):
  chosen = lambda key=None: frozenset(choices(route_eagerly(row, logits_of(row), key=key).assignment))
  assert chosen() == chosen() == {(e.token, e.expert) for e in loop(row, logits_of(row)) if e.valid}
  drawn = {chosen(jax.random.key(seed)) for seed in range(4)}
  assert len(drawn) > 1 if row.draw else drawn == {chosen()}


def leaks(row):
  """How a change in later tokens reaches earlier ones: "", "drops" (only where capacity drops), "always"."""
  found = {False: False, True: False}  # with a capacity? -> were earlier tokens' experts or weights changed?
  for seed in range(4):
    logits_TE = logits_of(row, seed)
    for cut in (4, 8):
      changed_TE = np.concatenate([logits_TE[:cut], logits_of(row, seed + 100)[cut:]])
      routings = [route_row(row, x).assignment for x in (logits_TE, changed_TE)]
      for capacity in (None, 1, 2, 3):
        before, after = (
          {pair: round(choices(a)[pair], 5) for pair in kept(a, capacity) if pair[0] < cut} for a in routings
        )
        found[capacity is not None] |= before != after
  return "always" if found[False] else "drops" if found[True] else ""


@every_router
def test_what_is_declared_to_leak_leaks_and_nothing_else(row):
  """Perturbs later tokens and compares what earlier ones get."""
  assert choice_of(row).leaks == row.leaks
  assert leaks(row) == (row.leaks if row.leak_found is None else row.leak_found)


@every_router
def test_what_the_router_declares_is_what_it_does(row):
  choice, routing = choice_of(row), route_row(row, logits_of(row))
  assert choice.takes_bias == row.takes_bias
  assert choice.gives_smooth_load == (routing.smooth_load_TE is not None)
  assert choice.whole_sequences == ("sequence" in row.context(0))


@rows_that(lambda row: row.context(0))
def test_what_a_router_reads_must_be_given(row):
  with pytest.raises(InputError, match="which the layer was not given"):
    route(choice_of(row), logits_of(row))
