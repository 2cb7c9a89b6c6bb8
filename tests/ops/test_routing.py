"""The laws that every router obeys, one table row per router; then what is particular to one of them."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import InputError
from moe_jax.ops.balancing import make_balancer
from moe_jax.ops.dispatch.slots import assign_slots
from moe_jax.ops.routing import ROUTERS, make_router, selected_experts, to_batch
from tests.reference import routing as reference
from tests.reference.moe_layer import kept_entries

T = 12


class Row(NamedTuple):
  """One router under test. `reference(logits_TE, k, bias_E, mask_T, draw_T)` gives a list of entries."""

  spec: str
  num_experts: int
  k: int
  reference: Callable
  draws: bool = False  # draws uniform numbers, one per token, if it is given a key
  causal: bool = True  # with any capacity, a token's experts do not depend on later tokens


ROWS = {
  "softmax_topk": Row("softmax_topk", 6, 2, reference.softmax_topk),
  "softmax_before": Row("softmax_topk:softmax=before", 6, 3, reference.softmax_before_topk),
  "every_expert": Row("softmax_topk:before", 3, 3, reference.softmax_before_topk),
  "sigmoid_topk": Row("sigmoid_topk", 6, 2, reference.sigmoid_topk),
  "deepseek_v3": Row("sigmoid_topk:normalize=true:scale=2.5", 6, 2, reference.deepseek_v3),
  "switch_top1": Row("switch_top1", 6, 1, reference.softmax_before_topk),
  "gshard_top2": Row("gshard_top2", 6, 2, reference.gshard_top2, draws=True, causal=False),
  "gshard_mesh": Row("gshard_top2:threshold=0.2", 6, 2, reference.gshard_top2_mesh, draws=True, causal=False),
}
every_router = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
MASK_T = np.arange(T) % 5 != 3


def logits_of(row, seed=0):
  return np.random.default_rng(seed).normal(size=(T, row.num_experts)).astype(np.float32) * 1.5


def bias_of(row):
  return np.linspace(0.4, -0.3, row.num_experts).astype(np.float32)


def key_of(row, seed=0):
  return jax.random.key(seed) if row.draws else None


def draws_of(row, key):
  return None if key is None else np.asarray(jax.random.uniform(key, (T,)))


class Step:
  """A router jitted with the gradients of sum(c * weight); counts how often it is traced."""

  def __init__(self, row):
    self.row, self.traces = row, 0
    route = make_router(row.spec, row.k)

    def loss(logits_TE, bias_E, key, mask_T, c_A):
      routing = route(logits_TE, bias_E=bias_E, key=key, mask_T=mask_T)
      return jnp.sum(c_A * routing.assignment.weight_A), routing

    def step(*args):
      self.traces += 1
      return jax.grad(loss, argnums=(0, 1), has_aux=True)(*args)

    self.jitted = jax.jit(step)

  def __call__(self, logits_TE, *, bias_E=None, key=None, mask_T=None, c_A=None):
    """Returns the routing, and the gradients with respect to logits and bias. No bias is one of zeros."""
    row = self.row
    bias_E = np.zeros(row.num_experts, np.float32) if bias_E is None else bias_E
    mask_T = np.ones(T, bool) if mask_T is None else mask_T
    c_A = np.zeros(T * row.k, np.float32) if c_A is None else c_A
    gradients, routing = self.jitted(logits_TE, bias_E, key, mask_T, c_A)
    return jax.tree.map(np.asarray, routing), jax.tree.map(np.asarray, gradients)


step_of = functools.cache(Step)


def route(row, logits_TE, **kwargs):
  return step_of(row)(logits_TE, **kwargs)[0]


def entries_of(assignment):
  """The assignment as the reference writes it."""
  a = jax.tree.map(np.asarray, assignment)
  holds_A = a.valid_A if a.holds_slot_A is None else a.holds_slot_A
  return [
    reference.Entry(*fields)
    for fields in zip(a.token_A, a.expert_A, a.weight_A, a.valid_A, holds_A, strict=True)
  ]


def assert_same_entries(got, want):
  """The same tokens, experts and flags in the same order, and close weights. Padding may name any expert."""
  keep = lambda e: (int(e.token), int(e.expert) if e.holds_slot else None, bool(e.valid), bool(e.holds_slot))
  assert [keep(e) for e in got] == [keep(e) for e in want]
  for g, w in zip(got, want):
    if w.valid:
      np.testing.assert_allclose(g.weight, w.weight, rtol=1e-5, err_msg=str(w))


def choices(assignment):
  """{(token, expert): weight} of the valid entries."""
  return {(int(e.token), int(e.expert)): float(e.weight) for e in entries_of(assignment) if e.valid}


def kept(assignment, capacity):
  """The (token, expert) pairs that get a slot."""
  grouped = jax.tree.map(lambda x: np.asarray(x)[None], assignment)
  pairs = zip(assignment.token_A, assignment.expert_A, kept_entries(grouped, capacity)[0])
  return {(int(t), int(e)) for t, e, k in pairs if k}


def test_every_router_has_a_row():
  assert {row.spec.split(":")[0] for row in ROWS.values()} == set(ROUTERS)


# --- laws ---


@every_router
@pytest.mark.parametrize("with_bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("with_mask", [False, True], ids=["no_mask", "mask"])
def test_equals_the_loop(row, with_bias, with_mask):
  bias_E = bias_of(row) if with_bias else None
  mask_T = MASK_T if with_mask else None
  for seed in range(3):
    logits_TE, key = logits_of(row, seed), key_of(row, seed)
    routing = route(row, logits_TE, bias_E=bias_E, key=key, mask_T=mask_T)
    want = row.reference(
      logits_TE,
      row.k,
      np.zeros(row.num_experts) if bias_E is None else bias_E,
      np.ones(T, bool) if mask_T is None else mask_T,
      draws_of(row, key),
    )
    assert_same_entries(entries_of(routing.assignment), want)
    np.testing.assert_array_equal(routing.logits_TE, logits_TE)
    np.testing.assert_array_equal(routing.mask_T, np.ones(T, bool) if mask_T is None else mask_T)
    score = reference.sigmoid if "sigmoid" in row.spec else reference.softmax
    np.testing.assert_allclose(routing.scores_TE, [score(x) for x in logits_TE.astype(float)], rtol=1e-5)


@every_router
def test_ties_go_to_the_lower_index(row):
  logits_TE = np.random.default_rng(1).integers(0, 2, (T, row.num_experts)).astype(np.float32)
  logits_TE[0] = 0
  want = row.reference(logits_TE, row.k, np.zeros(row.num_experts), np.ones(T, bool))
  mine = [(e.token, e.expert) for e in entries_of(route(row, logits_TE, key=key_of(row)).assignment)]
  assert mine == [(e.token, e.expert) for e in want]


@every_router
def test_dtypes_and_static_length(row):
  routing = route(row, logits_of(row), key=key_of(row))
  a = routing.assignment
  assert [x.dtype for x in a[:4]] == [np.int32, np.int32, np.float32, np.bool_]
  assert all(x.shape == (T * row.k,) for x in a if x is not None)
  assert routing.scores_TE.dtype == routing.logits_TE.dtype == np.float32


@every_router
def test_gradient_equals_finite_differences_of_the_loop(row):
  logits_TE, bias_E, key, mask_T = logits_of(row), bias_of(row), key_of(row), MASK_T
  draw_T = draws_of(row, key)
  valid_A = [e.valid for e in row.reference(logits_TE, row.k, bias_E, mask_T, draw_T)]
  c_A = np.random.default_rng(1).normal(size=T * row.k).astype(np.float32) * valid_A

  def loss(logits_TE):
    entries = row.reference(logits_TE, row.k, bias_E, mask_T, draw_T)
    return sum(float(c) * e.weight for c, e in zip(c_A, entries, strict=True))

  _, (d_logits_TE, d_bias_E) = step_of(row)(logits_TE, bias_E=bias_E, key=key, mask_T=mask_T, c_A=c_A)
  np.testing.assert_allclose(d_logits_TE, reference.finite_differences(loss, logits_TE), atol=1e-5)
  np.testing.assert_array_equal(d_bias_E, 0)
  assert np.abs(d_logits_TE[mask_T]).max() > 0.01  # a gradient of zero would prove nothing
  np.testing.assert_array_equal(d_logits_TE[~mask_T], 0)


@every_router
def test_permuting_experts_permutes_the_choices(row):
  logits_TE, bias_E, key = logits_of(row), bias_of(row), key_of(row)
  order = np.random.default_rng(2).permutation(row.num_experts)
  before = entries_of(route(row, logits_TE, bias_E=bias_E, key=key).assignment)
  after = entries_of(route(row, logits_TE[:, order], bias_E=bias_E[order], key=key).assignment)
  assert_same_entries([e._replace(expert=order[e.expert]) for e in after], before)


@every_router
def test_masked_tokens_are_never_valid_and_change_nothing(row):
  logits_TE, bias_E, key = logits_of(row), bias_of(row), key_of(row)
  entries = entries_of(route(row, logits_TE, bias_E=bias_E, key=key, mask_T=MASK_T).assignment)
  for e in entries:
    assert MASK_T[e.token] or not (e.valid or e.holds_slot)
  huge_TE = np.where(MASK_T[:, None], logits_TE, np.float32(1e30) * np.sign(logits_TE))
  others = route(row, huge_TE, bias_E=bias_E, key=key, mask_T=MASK_T)
  assert_same_entries(entries_of(others.assignment), entries)
  nobody = route(row, logits_TE, bias_E=bias_E, key=key, mask_T=np.zeros(T, bool))
  assert not choices(nobody.assignment)


@every_router
def test_a_constant_bias_changes_nothing(row):
  logits_TE, key = logits_of(row), key_of(row)
  plain = route(row, logits_TE, key=key)
  shifted = route(row, logits_TE, bias_E=np.full(row.num_experts, 0.25, np.float32), key=key)
  assert_same_entries(entries_of(shifted.assignment), entries_of(plain.assignment))
  np.testing.assert_array_equal(shifted.scores_TE, plain.scores_TE)


@every_router
def test_bias_moves_the_choice_and_never_a_weight(row):
  logits_TE, last = logits_of(row), row.num_experts - 1
  bias_E = np.zeros(row.num_experts, np.float32)
  bias_E[last] = 10
  plain = route(row, logits_TE, mask_T=MASK_T)
  biased = route(row, logits_TE, bias_E=bias_E, mask_T=MASK_T)
  np.testing.assert_array_equal(biased.scores_TE, plain.scores_TE)
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
  # Weights that do not depend on the other choices are those without a bias, also where the choice moved.
  if row.reference in (reference.softmax_before_topk, reference.sigmoid_topk):
    for pair, weight in after.items():
      np.testing.assert_allclose(weight, plain.scores_TE[pair], rtol=1e-6)


@every_router
def test_jit_equals_no_jit_and_traces_once(row):
  step, traces = step_of(row), set()
  for seed in range(2):
    logits_TE, key = logits_of(row, seed), key_of(row, seed)
    routing, _ = step(logits_TE, key=key)
    traces.add(step.traces)
    eager = make_router(row.spec, row.k)(jnp.asarray(logits_TE), key=key)
    assert_same_entries(entries_of(routing.assignment), entries_of(eager.assignment))
    np.testing.assert_array_equal(eager.mask_T, True)
  step(logits_of(row, 2), bias_E=bias_of(row), key=key_of(row, 2), mask_T=MASK_T)
  traces.add(step.traces)
  assert len(traces) == 1 and traces.pop() > 0  # other values never compile again


@every_router
def test_vmap_over_groups_equals_a_loop(row):
  groups = 3
  router = make_router(row.spec, row.k)
  logits_GTE = np.stack([logits_of(row, g) for g in range(groups)])
  mask_GT = np.stack([np.roll(MASK_T, g) for g in range(groups)])
  keys = jax.random.split(jax.random.key(5), groups) if row.draws else None
  one = lambda logits, mask, key: router(logits, bias_E=bias_of(row), key=key, mask_T=mask)
  got = jax.jit(jax.vmap(one, in_axes=(0, 0, 0 if row.draws else None)))(logits_GTE, mask_GT, keys)
  for g in range(groups):
    key = keys[g] if row.draws else None
    alone = route(row, logits_GTE[g], bias_E=bias_of(row), key=key, mask_T=mask_GT[g])
    mapped = jax.tree.map(lambda x, g=g: np.asarray(x)[g], got)
    assert_same_entries(entries_of(mapped.assignment), entries_of(alone.assignment))


def later_tokens_reach_back(row):
  """Whether a change in later tokens ever changes which entries of earlier ones are kept."""
  leaks = False
  for seed in range(4):
    logits_TE = logits_of(row, seed)
    for cut in (4, 8):
      changed_TE = np.concatenate([logits_TE[:cut], logits_of(row, seed + 100)[cut:]])
      for capacity in (1, 2, 3):
        before, after = (kept(route(row, x).assignment, capacity) for x in (logits_TE, changed_TE))
        leaks |= {p for p in before if p[0] < cut} != {p for p in after if p[0] < cut}
  return leaks


@every_router
def test_later_tokens_never_evict_earlier_ones(row):
  token_A = route(row, logits_of(row)).assignment.token_A
  assert row.causal == bool((np.diff(token_A) >= 0).all())
  # The rows that are not causal show that this check can fail.
  assert later_tokens_reach_back(row) == (not row.causal)


# --- GShard ---


def test_gshard_leaks_the_future_where_capacity_drops():
  """A later token's first choice takes the slot of an earlier token's second choice (Algorithm 1)."""
  row = ROWS["gshard_top2"]
  logits_TE = np.tile(np.array([[3, 2, 0, 0, 0, 0]], np.float32), (T, 1))
  mask_T = np.arange(T) < 2
  logits_TE[1] = [3, 0, 2, 0, 0, 0]
  assert (0, 1) in kept(route(row, logits_TE, mask_T=mask_T).assignment, 1)
  logits_TE[1] = [0, 3, 2, 0, 0, 0]  # only the second token changed, and the first one loses expert 1
  assert (0, 1) not in kept(route(row, logits_TE, mask_T=mask_T).assignment, 1)


@functools.cache
def slots_of(num_experts, capacity):
  return jax.jit(lambda a: assign_slots(a, T, num_experts, capacity))


def gshard_logits(seed=3):
  """Tokens that agree: the first experts overflow, and their queues hold skipped second choices."""
  return (logits_of(ROWS["gshard_top2"], seed) + np.array([2, 1.5, 0, 0, 0, 0])).astype(np.float32)


@pytest.mark.parametrize("capacity", [2, 4, 7])
def test_gshard_equals_algorithm_1(capacity):
  row, num_dropped, num_skipped = ROWS["gshard_top2"], 0, 0
  for seed in range(4):
    logits_TE, key = gshard_logits(seed), jax.random.key(seed)
    assignment = route(row, logits_TE, key=key).assignment
    kept_A = np.asarray(slots_of(row.num_experts, capacity)(assignment).kept_A)
    want, _ = reference.gshard_algorithm_1(logits_TE, capacity, draws_of(row, key))
    got = {
      (int(t), int(e)): float(w)
      for t, e, w, k in zip(assignment.token_A, assignment.expert_A, assignment.weight_A, kept_A)
      if k
    }
    assert got.keys() == want.keys()
    for pair, weight in want.items():
      np.testing.assert_allclose(got[pair], weight, rtol=1e-5)
    num_dropped += (assignment.valid_A & ~kept_A).sum()
    num_skipped += (~assignment.valid_A).sum()
  assert num_dropped > 0 and num_skipped > 0


def test_gshard_skipped_second_choices_leave_their_slots_empty():
  """The counter grows "always", also for a second choice that is not sent; Mesh-TensorFlow fills the gap."""
  row, key, tokens = ROWS["gshard_top2"], jax.random.key(0), 3
  logits_TE = np.full((T, row.num_experts), -30, np.float32)
  logits_TE[0, [0, 1]] = [5, 0]  # a weak second choice of expert 1: not sent
  logits_TE[1, [0, 1]] = [0.01, 0]  # a strong one: sent if there is room
  logits_TE[2, [2, 0]] = [9, 0]
  rnd_T = draws_of(row, key)
  combine, _ = reference.gshard_algorithm_1(logits_TE[:tokens], 1, rnd_T)
  assert (1, 1) not in combine and (1, 1) in reference.mesh_tensorflow_kept(logits_TE[:tokens], 1, rnd_T)
  assignment = route(row, logits_TE, key=key, mask_T=np.arange(T) < tokens).assignment
  assert kept(assignment, 1) == set(combine)
  # A router that left holds_slot_A out would count as Mesh-TensorFlow does.
  assert (1, 1) in kept(assignment._replace(holds_slot_A=None), 1)


def test_gshard_weights_are_normalised_before_drops_and_not_after():
  row, capacity = ROWS["gshard_top2"], 3
  assignment = route(row, gshard_logits()).assignment
  pairs, weights = kept(assignment, capacity), choices(assignment)
  sums_T = [sum(w for (t, _), w in weights.items() if t == token) for token in range(T)]
  np.testing.assert_allclose(sums_T, 1, rtol=1e-6)
  kept_sums_T = np.array([sum(weights[p] for p in pairs if p[0] == token) for token in range(T)])
  assert ((kept_sums_T > 0) & (kept_sums_T < 0.999)).any()


def test_gshard_sends_the_second_expert_with_probability_g2_over_threshold():
  row, n, thresholds = ROWS["gshard_top2"], 4000, (0.5, 0.2)
  routers = [make_router(f"gshard_top2:{threshold}", 2) for threshold in thresholds]
  logits_TE = jnp.asarray(logits_of(row)) * 2

  @jax.jit
  def sent_fraction(keys):
    sent = lambda key: [router(logits_TE, key=key).assignment.valid_A[T:] for router in routers]
    return [valid.mean(axis=0) for valid in jax.vmap(sent)(keys)]

  plain = reference.gshard_top2(logits_TE, 2, np.zeros(row.num_experts), np.ones(T, bool))
  g2_T = np.array([e.weight for e in plain[T:]])
  assert g2_T.min() < 0.1 and g2_T.max() > 0.3  # else the test would see little
  for threshold, sent_T in zip(thresholds, sent_fraction(jax.random.split(jax.random.key(1), n))):
    want_T = np.minimum(1, g2_T / threshold)
    np.testing.assert_allclose(sent_T, want_T, atol=4.5 * 0.5 / np.sqrt(n))
    np.testing.assert_array_equal(np.asarray(sent_T)[want_T == 1], 1)


@pytest.mark.parametrize("name", ["gshard_top2", "gshard_mesh"])
def test_gshard_without_a_key_sends_every_second_choice(name):
  assert route(ROWS[name], logits_of(ROWS[name])).assignment.valid_A.all()


def test_gshard_loss_is_l_aux_times_e_squared():
  """1/E^2 at balance becomes 1; first choices, counted before capacity (so a capacity of 1 changes nothing)."""
  row, num_groups = ROWS["gshard_top2"], 2
  logits_GTE = np.stack([gshard_logits(seed) for seed in range(num_groups)])
  l_aux_G = [reference.gshard_algorithm_1(logits, 1, np.ones(T))[1] for logits in logits_GTE]
  balancer = make_balancer("gshard_loss:weight=1:scope=group")

  @jax.jit
  def loss(logits_GTE):
    routing = jax.vmap(make_router(row.spec, 2))(logits_GTE)
    return balancer.losses(((),), to_batch(routing, 1, num_groups * T), ((),))

  (got,) = loss(logits_GTE).values()
  np.testing.assert_allclose(got, np.mean(l_aux_G) * row.num_experts**2, rtol=1e-5)


# --- what routers share ---


def test_selected_experts_are_the_valid_entries_and_carry_no_gradient():
  row = ROWS["gshard_top2"]
  routing = route(row, logits_of(row), key=key_of(row), mask_T=MASK_T)
  want_TE = np.zeros((T, row.num_experts))
  for e in entries_of(routing.assignment):
    want_TE[e.token, e.expert] += e.valid
  assert 0 < want_TE.sum() < 2 * MASK_T.sum()  # some second choices are not sent
  np.testing.assert_array_equal(jax.jit(selected_experts)(routing), want_TE)


def test_to_batch_regroups_tokens_in_order():
  row, router = ROWS["softmax_topk"], make_router("softmax_topk", 2)
  logits_GTE = np.stack([logits_of(row, g) for g in range(4)])
  mask_GT = np.stack([np.roll(MASK_T, g) for g in range(4)])

  @jax.jit
  def regroup(logits_GTE, mask_GT):
    routing = jax.vmap(lambda logits, mask: router(logits, mask_T=mask))(logits_GTE, mask_GT)
    batch = to_batch(routing, 2, 2 * T)
    assert batch.group_size == T
    return routing, batch

  routing, batch = regroup(logits_GTE, mask_GT)
  np.testing.assert_array_equal(batch.logits_BLE, logits_GTE.reshape(2, 2 * T, -1))
  np.testing.assert_array_equal(batch.mask_BL, mask_GT.reshape(2, 2 * T))
  np.testing.assert_array_equal(batch.scores_BLE[1, 3], routing.scores_TE[2, 3])
  expert_GTK = np.asarray(routing.assignment.expert_A).reshape(4, T, 2)
  want_GTE = np.eye(row.num_experts)[expert_GTK].sum(axis=2) * mask_GT[..., None]
  np.testing.assert_array_equal(batch.selected_BLE, want_GTE.reshape(2, 2 * T, -1))


@pytest.mark.parametrize(
  ("spec", "k", "message"),
  [
    ("switch_top1", 2, "--num_experts_per_token=2: router switch_top1 takes 1"),
    ("gshard_top2", 1, "--num_experts_per_token=1: router gshard_top2 takes 2"),
    ("gshard_top2:0", 2, "threshold must be in (0, 1], got 0.0"),
    ("gshard_top2:1.5", 2, "threshold must be in (0, 1], got 1.5"),
    ("softmax_topk:during", 2, "softmax must be one of before, after, got 'during'"),
    ("softmax_top", 2, "unknown router 'softmax_top': did you mean softmax_topk"),
    ("sigmoid_topk:normalize=1", 2, "normalize must be true or false, got '1'"),
  ],
)
def test_wrong_settings_are_one_line_errors(spec, k, message):
  with pytest.raises(InputError) as error:
    make_router(spec, k)
  assert message in str(error.value) and "\n" not in str(error.value)
