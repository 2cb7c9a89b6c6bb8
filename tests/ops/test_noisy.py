"""Properties of noisy top-k (1701.06538) and V-MoE's variant of it (2106.05974)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.routing import make_choice
from tests.ops.choosing import route
from tests.ops.router_laws import MASK_T, choices, key_of, logits_of, route_row
from tests.ops.router_row import T
from tests.ops.router_rows import ROWS
from tests.reference import noisy_routing as reference
from tests.reference.routing import finite_differences

NOISY, VMOE = ROWS["noisy_topk"], ROWS["vmoe_topk"]
both = pytest.mark.parametrize("row", [NOISY, VMOE], ids=["noisy_topk", "vmoe_topk"])


def smooth_load_by_loop(row, logits_TE, draw_TE, seed=0):
  if row is VMOE:
    return reference.vmoe_topk_load(logits_TE, row.k, draw_TE)
  return reference.noisy_topk_load(logits_TE, row.k, draw_TE, *row.more_logits(seed))


def selected(assignment):
  """[T, E] bool."""
  chosen_TE = np.zeros((T, NOISY.num_experts), bool)
  for pair in choices(assignment):
    chosen_TE[pair] = True
  return chosen_TE


# --- the smooth load ---


@both
@pytest.mark.parametrize("with_key", [False, True], ids=["no_key", "key"])
def test_smooth_load_equals_the_loop(row, with_key):
  for seed in range(3):
    logits_TE, key = logits_of(row, seed), key_of(row, seed) if with_key else None
    got_TE = route_row(row, logits_TE, key=key, seed=seed).smooth_load_TE
    want_TE = smooth_load_by_loop(row, logits_TE, row.draw(key) if with_key else None, seed)
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
  """Jitted gradients of sum(c * what) in logits and noise logits, `what` being smooth load or weights."""

  def total(logits_TE, noise_TE, key, mask_T, c_TE, c_A):
    more = [noise_TE] if row is NOISY else []
    routing = route(make_choice(row.spec, row.num_experts, row.k), logits_TE, *more, key=key, mask=mask_T)
    return jnp.sum(c_TE * jnp.where(mask_T[:, None], routing.smooth_load_TE, 0)) + jnp.sum(
      c_A * jnp.where(routing.assignment.valid_A, routing.assignment.weight_A, 0)
    )

  return jax.jit(jax.grad(total, argnums=(0, 1)))


def coefficients(row, seed=1):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(T, row.num_experts)).astype(np.float32), rng.normal(size=T * row.k).astype(
    np.float32
  )


@both
def test_gradients_of_the_smooth_load_equal_finite_differences(row):
  """Also through the threshold, which is another expert's noisy logit."""
  logits_TE, noise_TE = logits_of(row), NOISY.more_logits(0)[0]
  c_TE, c_A = coefficients(row)
  key = key_of(row)

  def loss(logits_TE, noise_TE):
    if row is VMOE:
      return np.sum(c_TE * reference.vmoe_topk_load(logits_TE, row.k, row.draw(key)))
    return np.sum(c_TE * reference.noisy_topk_load(logits_TE, row.k, row.draw(key), noise_TE))

  got = gradients(row)(logits_TE, noise_TE, key, np.ones(T, bool), c_TE, 0 * c_A)
  want_TE = finite_differences(lambda x: loss(x, noise_TE), logits_TE)
  np.testing.assert_allclose(got[0], want_TE, atol=1e-5)
  np.testing.assert_allclose(got[1], finite_differences(lambda x: loss(logits_TE, x), noise_TE), atol=1e-5)
  assert np.abs(got[0]).max() > 0.1 and (row is VMOE or np.abs(got[1]).max() > 0.1)


def test_weights_reach_the_noise_logits():
  logits_TE, noise_TE = logits_of(NOISY), NOISY.more_logits(0)[0]
  c_TE, c_A = coefficients(NOISY)
  everyone = np.ones(T, bool)

  def loss(noise_TE, draw_TE):
    zero_E = np.zeros(NOISY.num_experts)
    entries = reference.noisy_topk(logits_TE, NOISY.k, zero_E, everyone, draw_TE, noise_TE)
    return sum(float(c) * e.weight for c, e in zip(c_A, entries, strict=True))

  key = key_of(NOISY)
  got = gradients(NOISY)(logits_TE, noise_TE, key, everyone, 0 * c_TE, c_A)[1]
  want = finite_differences(lambda x: loss(x, NOISY.draw(key)), noise_TE)
  np.testing.assert_allclose(got, want, atol=1e-5)
  assert np.abs(got).max() > 0.1
  np.testing.assert_array_equal(gradients(NOISY)(logits_TE, noise_TE, None, everyone, 0 * c_TE, c_A)[1], 0)


@both
@pytest.mark.parametrize("huge", [1e30, -1e30, np.inf, np.nan])
def test_padding_gives_no_gradient_that_is_no_number(row, huge):
  hide = lambda x: np.where(MASK_T[:, None], x, np.float32(huge))
  got = gradients(row)(
    hide(logits_of(row)), hide(NOISY.more_logits(0)[0]), key_of(row), MASK_T, *coefficients(row)
  )
  for gradient_TX in got:
    assert np.isfinite(gradient_TX).all()
    np.testing.assert_array_equal(gradient_TX[~MASK_T], 0)


@pytest.mark.parametrize("noise", [-1e4, -200.0, 1e4])
def test_extreme_noise_has_finite_gradients(noise):
  """softplus(-200) is 0 in float32: the smooth load is a step, and has no slope but at the step itself."""
  noise_TE = np.full((T, NOISY.num_experts), noise, np.float32)
  args = (key_of(NOISY), np.ones(T, bool), *coefficients(NOISY))
  for logits_TE in (logits_of(NOISY), np.zeros((T, NOISY.num_experts), np.float32)):
    assert all(np.isfinite(g).all() for g in gradients(NOISY)(logits_TE, noise_TE, *args))


# --- the choice ---


def frequencies(spec, num_experts, k, num_projections, keys=2000):
  """How often each expert is chosen, and its mean smooth load, where all logits are 0."""
  choice = make_choice(spec, num_experts, k)

  def one(key):
    routing = route(choice, *[jnp.zeros((1, num_experts))] * num_projections, key=key)
    return jnp.zeros(num_experts).at[routing.assignment.expert_A].add(1), routing.smooth_load_TE[0]

  found = jax.jit(lambda keys: jax.vmap(one)(keys))(jax.random.split(jax.random.key(3), keys))
  return [np.asarray(x).mean(axis=0) for x in found], 4.5 * 0.5 / np.sqrt(keys)


@pytest.mark.parametrize("spec", ["noisy_topk", "vmoe_topk"])
def test_zero_logits_load_all_experts_alike(spec):
  """Why the projections of noisy top-k start at 0 (1701.06538, appendix A)."""
  (chosen_E, smooth_E), tolerance = frequencies(spec, 6, 2, 2 if spec == "noisy_topk" else 1)
  np.testing.assert_allclose(chosen_E, 2 / 6, atol=tolerance)
  if spec == "noisy_topk":  # a smooth load is an estimate of the load; V-MoE's is a biased one
    np.testing.assert_allclose(smooth_E, 2 / 6, atol=tolerance)
  np.testing.assert_allclose(smooth_E, smooth_E.mean(), atol=tolerance)


def test_projections_start_at_zero_only_where_noise_is_learned():
  assert make_choice("noisy_topk", 6, 2).zero_init and not make_choice("vmoe_topk", 6, 2).zero_init
