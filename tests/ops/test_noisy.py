"""Properties of noisy top-k (1701.06538), flat and in two levels, and of V-MoE's variant of it (2106.05974)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.routing import make_choice
from tests.ops.choosing import route
from tests.ops.router_laws import MASK_T, choice_of, choices, key_of, logits_of, route_row
from tests.ops.router_row import T
from tests.ops.router_rows import ROWS
from tests.reference import noisy_routing as reference
from tests.reference.routing import finite_differences

NOISY, VMOE, LEVELS = ROWS["noisy_topk"], ROWS["vmoe_topk"], ROWS["hierarchical_topk"]
both = pytest.mark.parametrize("row", [NOISY, VMOE], ids=["noisy_topk", "vmoe_topk"])
all_three = pytest.mark.parametrize("row", [NOISY, VMOE, LEVELS], ids=["noisy_topk", "vmoe_topk", "levels"])
EVERYONE = np.ones(T, bool)


def smooth_load_by_loop(row, logits_TE, draw, *more_logits):
  if row is LEVELS:
    return reference.hierarchical_topk_load(logits_TE, row.k, draw, *more_logits, groups_per_token=2)
  load = reference.vmoe_topk_load if row is VMOE else reference.noisy_topk_load
  return load(logits_TE, row.k, draw, *more_logits)


def selected(assignment):
  """[T, E] bool."""
  chosen_TE = np.zeros((T, NOISY.num_experts), bool)
  for pair in choices(assignment):
    chosen_TE[pair] = True
  return chosen_TE


# --- the smooth load ---


@all_three
@pytest.mark.parametrize("with_key", [False, True], ids=["no_key", "key"])
def test_smooth_load_equals_the_loop(row, with_key):
  for seed in range(3):
    logits_TE, key = logits_of(row, seed), key_of(row, seed) if with_key else None
    got_TE = route_row(row, logits_TE, key=key, seed=seed).smooth_load_TE
    want_TE = smooth_load_by_loop(row, logits_TE, row.draw(key) if with_key else None, *row.more_logits(seed))
    np.testing.assert_allclose(got_TE, want_TE, rtol=1e-4, atol=1e-6)
    assert got_TE.dtype == np.float32 and 0.05 < np.mean(got_TE) < 0.95


@functools.cache
def redrawn_frequency(row, draws=4000):
  """How often expert i is among the k best, if its noise alone is drawn again: counted, in numpy."""
  logits_TE, rng = logits_of(row), np.random.default_rng(0)
  if row is VMOE:
    std_TE = np.full(logits_TE.shape, 1 / row.num_experts)
  else:
    std_TE = np.log1p(np.exp(row.more_logits(0)[0].astype(float))) + 0.01
  noisy_TE = logits_TE + std_TE * row.draw(key_of(row))
  frequency_TE = np.zeros(logits_TE.shape)
  for t, e in np.ndindex(*logits_TE.shape):
    redrawn_N = logits_TE[t, e] + std_TE[t, e] * rng.normal(size=draws)
    others_E = np.delete(noisy_TE[t], e)
    frequency_TE[t, e] = np.mean((others_E[None] > redrawn_N[:, None]).sum(axis=1) < row.k)
  return frequency_TE, 4.5 * 0.5 / np.sqrt(draws)


def test_smooth_load_is_the_frequency_with_only_its_own_noise_redrawn():
  frequency_TE, tolerance = redrawn_frequency(NOISY)
  got_TE = route_row(NOISY, logits_of(NOISY), key=key_of(NOISY)).smooth_load_TE
  np.testing.assert_allclose(got_TE, frequency_TE, atol=tolerance)


def test_vmoe_underestimates_what_is_chosen():
  """Its threshold includes the expert's own noisy logit: right for experts not chosen, too high for the rest."""
  frequency_TE, tolerance = redrawn_frequency(VMOE)
  routing = route_row(VMOE, logits_of(VMOE), key=key_of(VMOE))
  chosen_TE, got_TE = selected(routing.assignment), routing.smooth_load_TE
  np.testing.assert_allclose(got_TE[~chosen_TE], frequency_TE[~chosen_TE], atol=tolerance)
  assert (got_TE[chosen_TE] < frequency_TE[chosen_TE] + tolerance).all()
  assert (frequency_TE - got_TE)[chosen_TE].max() > 0.2


def test_without_noise_the_chosen_are_those_above_one_half():
  for seed in range(3):
    routing = route_row(NOISY, logits_of(NOISY, seed), seed=seed)
    np.testing.assert_array_equal(routing.smooth_load_TE > 0.5, selected(routing.assignment))
    routing = route_row(VMOE, logits_of(VMOE, seed), seed=seed)
    np.testing.assert_array_equal(routing.smooth_load_TE >= 0.5, selected(routing.assignment))
    np.testing.assert_array_equal((routing.smooth_load_TE == 0.5).sum(axis=1), 1)  # the K-th itself


@both
def test_smooth_load_does_not_know_the_bias(row):
  logits_TE, key = logits_of(row), key_of(row)
  bias_E = np.linspace(2, -2, row.num_experts).astype(np.float32)
  plain, biased = route_row(row, logits_TE, key=key), route_row(row, logits_TE, key=key, bias_E=bias_E)
  np.testing.assert_array_equal(plain.smooth_load_TE, biased.smooth_load_TE)
  assert (selected(plain.assignment) != selected(biased.assignment)).any()


@pytest.mark.parametrize("spec", ["noisy_topk", "vmoe_topk"])
def test_if_every_expert_is_chosen(spec):
  """No other expert is left to be the K-th one, so nothing can fail; V-MoE's threshold is then the lowest."""
  choice, logits_TE = make_choice(spec, 3, 3), logits_of(NOISY)[:, :3]
  more, key = [np.zeros((T, 3), np.float32)] * (spec == "noisy_topk"), jax.random.key(0)
  load = lambda logits_TE: route(choice, logits_TE, *more, key=key).smooth_load_TE
  if spec == "noisy_topk":
    np.testing.assert_array_equal(load(logits_TE), 1)
  else:
    draw_TE = np.asarray(jax.random.normal(key, (T, 3)))
    np.testing.assert_allclose(load(logits_TE), reference.vmoe_topk_load(logits_TE, 3, draw_TE), atol=1e-5)
  assert np.isfinite(jax.grad(lambda x: load(x).sum())(logits_TE)).all()


# --- gradients ---


@functools.cache
def gradients(row):
  """Jitted gradients of sum(c * smooth load) + sum(c * weight) in the logits of each projection."""

  def total(all_logits, key, mask_T, c_TE, c_A):
    routing = route(make_choice(row.spec, row.num_experts, row.k), *all_logits, key=key, mask=mask_T)
    a = routing.assignment
    of_load = jnp.sum(c_TE * jnp.where(mask_T[:, None], routing.smooth_load_TE, 0))
    return of_load + jnp.sum(c_A * jnp.where(a.valid_A, a.weight_A, 0))

  return jax.jit(jax.grad(total))


def projections(row):
  return [logits_of(row), *row.more_logits(0)]


def coefficients(row):
  rng = np.random.default_rng(1)
  return [rng.normal(size=shape).astype(np.float32) for shape in ((T, row.num_experts), T * row.k)]


@pytest.mark.parametrize(
  ("row", "which"), [(NOISY, 0), (NOISY, 1), (VMOE, 0), (LEVELS, 0), (LEVELS, 1), (LEVELS, 2), (LEVELS, 3)]
)
def test_gradients_of_smooth_load_and_weights_equal_finite_differences(row, which):
  """Also through the threshold, which is another expert's noisy logit, and each alone."""
  all_logits, key = projections(row), key_of(row)
  c_TE, c_A = coefficients(row)

  def losses(logits_TX):
    given = [*all_logits[:which], logits_TX, *all_logits[which + 1 :]]
    load_TE = smooth_load_by_loop(row, given[0], row.draw(key), *given[1:])
    entries = row.reference(given[0], row.k, np.zeros(row.num_experts), EVERYONE, row.draw(key), *given[1:])
    return np.sum(c_TE * load_TE), sum(float(c) * e.weight for c, e in zip(c_A, entries, strict=True))

  for i, c in enumerate(((c_TE, 0 * c_A), (0 * c_TE, c_A))):
    got_TX = gradients(row)(all_logits, key, EVERYONE, *c)[which]
    want_TX = finite_differences(lambda x, i=i: losses(x)[i], all_logits[which])
    np.testing.assert_allclose(got_TX, want_TX, atol=1e-5)
    assert np.abs(got_TX).max() > 0.1


def test_without_a_key_the_noise_logits_have_no_gradient_of_the_weights():
  c_TE, c_A = coefficients(NOISY)
  np.testing.assert_array_equal(gradients(NOISY)(projections(NOISY), None, EVERYONE, 0 * c_TE, c_A)[1], 0)


@all_three
@pytest.mark.parametrize("huge", [1e30, -1e30, np.inf, np.nan])
def test_padding_gives_no_gradient_that_is_no_number(row, huge):
  hidden = [np.where(MASK_T[:, None], x, np.float32(huge)) for x in projections(row)]
  for gradient_TX in gradients(row)(hidden, key_of(row), MASK_T, *coefficients(row)):
    assert np.isfinite(gradient_TX).all()
    np.testing.assert_array_equal(gradient_TX[~MASK_T], 0)


@pytest.mark.parametrize("noise", [-1e4, -200.0, 1e4])
def test_extreme_noise_has_finite_gradients(noise):
  """softplus(-200) is 0 in float32: the smooth load is a step, and has no slope but at the step itself."""
  noise_TE = np.full((T, NOISY.num_experts), noise, np.float32)
  args = (key_of(NOISY), EVERYONE, *coefficients(NOISY))
  for logits_TE in (logits_of(NOISY), np.zeros((T, NOISY.num_experts), np.float32)):
    assert all(np.isfinite(g).all() for g in gradients(NOISY)([logits_TE, noise_TE], *args))


# --- the choice ---


@all_three
def test_zero_logits_load_all_experts_alike(row):
  """Why the projections of noisy top-k start at 0 (1701.06538, appendix A)."""
  choice, n, share = choice_of(row), 2000, row.k / row.num_experts
  zeros, atol = [jnp.zeros((1, x.shape[1])) for x in projections(row)], 4.5 * 0.5 / np.sqrt(n)

  def one(key):
    routing = route(choice, *zeros, key=key)
    return jnp.zeros(row.num_experts).at[routing.assignment.expert_A].add(1), routing.smooth_load_TE[0]

  found = jax.jit(lambda keys: jax.vmap(one)(keys))(jax.random.split(jax.random.key(3), n))
  chosen_E, smooth_E = (np.mean(x, axis=0) for x in found)
  np.testing.assert_allclose(chosen_E, share, atol=atol)
  if row is not VMOE:  # a smooth load is an estimate of the load; V-MoE's is a biased one
    np.testing.assert_allclose(smooth_E, share, atol=atol)
  np.testing.assert_allclose(smooth_E, smooth_E.mean(), atol=atol)


def test_projections_start_at_zero_only_where_noise_is_learned():
  others = VMOE, ROWS["hierarchical_without_noise"]
  assert all(choice_of(row).zero_init == (row not in others) for row in (NOISY, LEVELS, *others))
