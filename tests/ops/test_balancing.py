"""The laws that every balancer obeys, one table row per balancer; then what is particular to one of them."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import InputError
from moe_jax.ops import stats
from moe_jax.ops.balancing import BALANCERS, Balancer, combine, make_balancer
from moe_jax.ops.balancing.losses import SCOPES
from moe_jax.ops.routing import make_router, to_batch
from moe_jax.types import BatchRouting
from tests.reference import balancing as reference
from tests.reference.moe_layer import kept_entries
from tests.reference.routing import finite_differences

B, L, GROUP, E, K = 4, 6, 3, 4, 2


class Row(NamedTuple):
  """One balancer under test."""

  spec: str
  score: str = "softmax"  # how scores come from logits
  scope: str = ""
  load_k: int = 0  # how many choices of a token count as load; 0: no load is counted
  weight: float = 1.0

  @property
  def observes(self):
    return self.spec.startswith("loss_free_bias") or self.scope == "global_batch"

  def reference(self, logits_BLE, mask_BL, step_counts_E):
    """The loss with its weight, in float64."""
    if self.spec.startswith("z_loss"):
      return self.weight * reference.z_loss(logits_BLE, mask_BL)
    if not self.scope:
      return 0.0
    return self.weight * reference.load_balancing_loss(
      logits_BLE, mask_BL, self.load_k, self.score, self.scope, GROUP, step_counts_E
    )


ROWS = {
  "switch_sequence": Row("switch_loss:0.5:sequence", "sigmoid", "sequence", K, 0.5),
  "switch_group": Row("switch_loss:0.5:group", "softmax", "group", K, 0.5),
  "switch_micro_batch": Row("switch_loss:0.5:micro_batch", "softmax", "micro_batch", K, 0.5),
  "switch_global_batch": Row("switch_loss:0.5", "sigmoid", "global_batch", K, 0.5),
  "gshard_sequence": Row("gshard_loss:2:sequence", "softmax", "sequence", 1, 2),
  "gshard_group": Row("gshard_loss:2:group", "softmax", "group", 1, 2),
  "gshard_micro_batch": Row("gshard_loss:2:micro_batch", "sigmoid", "micro_batch", 1, 2),
  "gshard_global_batch": Row("gshard_loss:2", "softmax", "global_batch", 1, 2),
  "z_loss": Row("z_loss:0.5", weight=0.5),
  "loss_free_bias": Row("loss_free_bias:0.25", "sigmoid", load_k=K, weight=0),
  "none": Row("none", weight=0),
  "zero_weight": Row("switch_loss:0:group", scope="group", load_k=K, weight=0),
  "zero_z": Row("z_loss:0", weight=0),
}
every_balancer = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
LOAD_BALANCING = {name: row for name, row in ROWS.items() if row.scope and row.weight}

MASK_BL = np.random.default_rng(1).random((B, L)) < 0.8
MASK_BL[1] = False  # an empty sequence
MASK_BL[2, :GROUP] = False  # an empty group


def logits_of(seed=0, skew=1.0):
  """Experts differ in popularity, so that no loss is at its balanced value."""
  noise_BLE = np.random.default_rng(seed).normal(size=(B, L, E))
  return (noise_BLE + skew * np.linspace(1, -1, E)).astype(np.float32)


def routing_of(score, logits_BLE, mask_BL, selected_BLE):
  """What the layer hands to a balancer, with the choice of experts made by the reference."""
  scores_BLE = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}[score](logits_BLE)
  return BatchRouting(logits_BLE, scores_BLE, selected_BLE, mask_BL, GROUP)


def add(a, b):
  return jax.tree.map(lambda x, y: x + y, a, b)


def total_loss(row, logits_BLE, selected_BLE, mask_BL, others):
  """Returns loss and observed statistics. `others`: what the step's other micro-batches observed."""
  balancer = make_balancer(row.spec)
  routing = routing_of(row.score, logits_BLE, mask_BL, selected_BLE)
  observed = balancer.observe(routing)
  found = balancer.losses(balancer.init(E), routing, add(observed, others))
  return sum(found.values(), jnp.zeros(())), observed


@jax.jit
def evaluate_every_row(logits_BLE, selected_BLE, mask_BL, others):
  """((loss, observed), gradient) of every row, as one program: that compiles in half the time of a program per row."""
  evaluate = lambda row, others: jax.value_and_grad(functools.partial(total_loss, row), has_aux=True)(
    logits_BLE, selected_BLE[row.score], mask_BL, others
  )
  return {name: evaluate(row, others[name]) for name, row in ROWS.items()}


def nothing_observed(row):
  return (np.zeros(E, np.float32) if row.observes else (),)


def selected(score, logits_BLE, mask_BL):
  return reference.selected(logits_BLE, mask_BL, K, score).astype(np.float32)


def run(row, logits_BLE, mask_BL=MASK_BL, others=None):
  """Loss, observed statistics and gradient, compiled; the same program for all tests of one shape."""
  name = next(name for name in ROWS if ROWS[name] == row)
  others_of = {name: nothing_observed(row) for name, row in ROWS.items()}
  if others is not None:
    others_of[name] = others
  selected_BLE = {score: selected(score, logits_BLE, mask_BL) for score in ("softmax", "sigmoid")}
  (loss, observed), gradient = evaluate_every_row(logits_BLE, selected_BLE, mask_BL, others_of)[name]
  return float(loss), jax.tree.map(np.asarray, observed), np.asarray(gradient)


def step_counts(row, logits_BLE, mask_BL):
  """What the balancer counts as load, or None."""
  if not row.load_k:
    return None
  return reference.selected(logits_BLE, mask_BL, row.load_k, row.score).sum(axis=(0, 1))


def with_huge_padding(logits_BLE):
  return np.where(MASK_BL[..., None], logits_BLE, np.float32(1e30) * np.sign(logits_BLE))


def test_every_balancer_and_every_scope_has_a_row():
  assert {row.spec.split(":")[0] for row in ROWS.values()} == set(BALANCERS)
  assert {(r.spec.split("_")[0], r.scope) for r in LOAD_BALANCING.values()} == {
    (name, scope) for name in ("switch", "gshard") for scope in SCOPES
  }


# --- laws ---


@every_balancer
@pytest.mark.parametrize("mask_BL", [np.ones((B, L), bool), MASK_BL], ids=["no_mask", "mask"])
def test_equals_the_loop(row, mask_BL):
  for seed in range(3):
    logits_BLE = logits_of(seed)
    counts_E = step_counts(row, logits_BLE, mask_BL)
    loss, observed, _ = run(row, logits_BLE, mask_BL)
    np.testing.assert_allclose(loss, row.reference(logits_BLE.astype(float), mask_BL, counts_E), rtol=1e-5)
    if jax.tree.leaves(observed):
      np.testing.assert_array_equal(observed[0], counts_E)


@every_balancer
def test_gradient_equals_finite_differences_of_the_loop(row):
  logits_BLE = logits_of()
  counts_E = step_counts(row, logits_BLE, MASK_BL)
  _, _, gradient = run(row, logits_BLE)
  want = finite_differences(lambda x: row.reference(x, MASK_BL, counts_E), logits_BLE)
  np.testing.assert_allclose(gradient, want, atol=1e-6)
  np.testing.assert_array_equal(gradient[~MASK_BL], 0)
  # Neither a gradient of zero where there is a loss, nor a loss where the weight is zero.
  assert (np.abs(gradient).max() > 1e-4) if row.weight else (gradient == 0).all()


@every_balancer
def test_masked_tokens_do_not_count(row):
  loss, observed, gradient = run(row, logits_of())
  huge = run(row, with_huge_padding(logits_of()))
  np.testing.assert_allclose(huge[0], loss, rtol=1e-6)
  np.testing.assert_allclose(huge[2], gradient, atol=1e-7)
  jax.tree.map(np.testing.assert_array_equal, huge[1], observed)


@every_balancer
def test_a_fully_masked_batch_gives_zero(row):
  loss, observed, gradient = run(row, logits_of(), np.zeros((B, L), bool))
  assert loss == 0
  np.testing.assert_array_equal(gradient, 0)
  assert all((x == 0).all() for x in jax.tree.leaves(observed))


@every_balancer
def test_permuting_experts_changes_nothing(row):
  logits_BLE, order = logits_of(), np.array([2, 0, 3, 1])
  loss, observed, gradient = run(row, logits_BLE)
  permuted = run(row, logits_BLE[..., order])
  np.testing.assert_allclose(permuted[0], loss, rtol=1e-6)
  np.testing.assert_allclose(permuted[2], gradient[..., order], atol=1e-7)
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y[order]), permuted[1], observed)


@every_balancer
def test_jit_equals_no_jit(row):
  """Also with huge padding: XLA turns a product with a mask into a choice, which would hide inf * 0."""
  loss, observed, _ = run(row, logits_of())
  eager_loss, eager_observed = total_loss(
    row,
    with_huge_padding(logits_of()),
    selected(row.score, logits_of(), MASK_BL),
    MASK_BL,
    nothing_observed(row),
  )
  np.testing.assert_allclose(loss, eager_loss, rtol=1e-6)
  jax.tree.map(np.testing.assert_array_equal, observed, eager_observed)


def in_micro_batches(row, logits_BLE, mask_BL):
  """The token-weighted mean of loss and gradient over two micro-batches, as the train step takes it.

  A micro-batch is the batch with the other sequences masked, which spares a second compilation.
  """
  first_BL = np.arange(B)[:, None] < B // 2
  masks = [mask_BL & first_BL, mask_BL & ~first_BL]
  observed = [run(row, logits_BLE, mask)[1] for mask in masks]
  loss, gradient_BLE = 0.0, 0.0
  for mask, others in zip(masks, observed[::-1]):
    share = mask.sum() / mask_BL.sum()
    part_loss, _, part_gradient_BLE = run(row, logits_BLE, mask, others)
    loss, gradient_BLE = loss + share * part_loss, gradient_BLE + share * part_gradient_BLE
  return loss, add(*observed), gradient_BLE


@every_balancer
def test_micro_batches_add_up_to_the_batch(row):
  """One step is the same step however it is cut up; only the scope `micro_batch` depends on the cut."""
  logits_BLE = logits_of()
  loss, observed, gradient = run(row, logits_BLE)
  cut_loss, cut_observed, cut_gradient = in_micro_batches(row, logits_BLE, MASK_BL)
  jax.tree.map(np.testing.assert_array_equal, cut_observed, observed)
  if row.scope == "micro_batch":
    assert abs(cut_loss - loss) > 1e-3 * loss
    return
  np.testing.assert_allclose(cut_loss, loss, rtol=1e-6)
  np.testing.assert_allclose(cut_gradient, gradient, atol=1e-7)


@pytest.mark.parametrize("row", LOAD_BALANCING.values(), ids=LOAD_BALANCING)
def test_what_each_scope_sees(row):
  """Each micro-batch is collapsed on two experts of its own, yet over both all experts are used equally."""
  logits_BLE = np.full((B, L, E), -20, np.float32)
  logits_BLE[: B // 2, :, :2] = 20
  logits_BLE[B // 2 :, :, 2:] = 20
  all_tokens = np.ones((B, L), bool)
  cut = in_micro_batches(row, logits_BLE, all_tokens)[0] / row.weight
  whole = run(row, logits_BLE, all_tokens)[0] / row.weight
  want = {"micro_batch": (E / K, 1), "global_batch": (1, 1)}.get(row.scope, (E / K, E / K))
  np.testing.assert_allclose((cut, whole), want, rtol=1e-5)


# --- scale ---


@functools.partial(jax.jit, static_argnames="group")
def unit_losses(logits_BLE, scores_BLE, selected_BLE, mask_BL, group):
  """Every load-balancing loss in every scope with weight 1."""
  routing, found = BatchRouting(logits_BLE, scores_BLE, selected_BLE, mask_BL, group), {}
  for name in ("switch_loss", "gshard_loss"):
    for scope in SCOPES:
      balancer = make_balancer(f"{name}:1:{scope}")
      (found[f"{name}:{scope}"],) = balancer.losses(((),), routing, balancer.observe(routing)).values()
  return found


def unit_losses_of(logits_LE, k, group):
  """The same for two sequences of `logits_LE`; the scores, as sigmoids do, sum to anything."""
  order_LE = np.argsort(-logits_LE, axis=-1, kind="stable")
  selected_LE = np.zeros_like(logits_LE)
  np.put_along_axis(selected_LE, order_LE[:, :k], 1, axis=-1)
  scores_LE = np.exp(logits_LE) * np.random.default_rng(0).uniform(0.1, 1, (len(logits_LE), 1))
  twice = lambda x: np.stack([x, x]).astype(np.float32)
  mask_BL = np.ones((2, len(logits_LE)), bool)
  return unit_losses(twice(logits_LE), twice(scores_LE), twice(selected_LE), mask_BL, group=group)


EVERY_SHAPE = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4), (8, 1), (8, 2), (8, 4)]


@pytest.mark.parametrize(("num_experts", "k"), EVERY_SHAPE)
def test_one_at_balance_and_e_over_k_when_collapsed(num_experts, k):
  """Token t has the logits of token 0, moved on by t experts: balanced within every 8 tokens."""
  base_E = np.linspace(2, -2, num_experts)
  balanced_LE = np.stack([np.roll(base_E, t) for t in range(16)])
  for name, loss in unit_losses_of(balanced_LE, k, group=8).items():
    np.testing.assert_allclose(loss, 1, rtol=1e-5, err_msg=name)
  collapsed_LE = np.full((16, num_experts), -30.0)
  collapsed_LE[:, :k] = 30
  for name, loss in unit_losses_of(collapsed_LE, k, group=8).items():
    np.testing.assert_allclose(loss, num_experts / k, rtol=1e-5, err_msg=name)


def test_units_are_weighted_by_their_valid_tokens():
  """Two sequences, one balanced (loss 1) with 6 tokens, one collapsed (loss 2) with 2 tokens."""
  logits_BLE = np.full((B, L, E), -20, np.float32)
  for t in range(L):
    logits_BLE[0, t, [(2 * t) % E, (2 * t + 1) % E]] = 20
  logits_BLE[1, :, :2] = 20
  mask_BL = np.zeros((B, L), bool)
  mask_BL[0], mask_BL[1, 1:3] = True, True
  row = ROWS["switch_sequence"]
  np.testing.assert_allclose(run(row, logits_BLE, mask_BL)[0] / row.weight, (6 * 1 + 2 * 2) / 8, rtol=1e-5)


def test_tiny_sigmoid_scores_do_not_escape_the_loss():
  """The scores enter by their ratios: with an epsilon in their sum, a router could shrink them all."""
  row = ROWS["switch_sequence"]
  collapsed_BLE = logits_of(skew=3)
  all_tokens = np.ones((B, L), bool)
  for shift in (0, -30, -60):
    logits_BLE = (collapsed_BLE + shift).astype(np.float32)
    loss, _, gradient = run(row, logits_BLE, all_tokens)
    np.testing.assert_allclose(loss, row.reference(logits_BLE.astype(float), all_tokens, None), rtol=1e-5)
    assert loss > 1.2 * row.weight
  # Far out on the tail, moving all logits of a token together gains nothing, but moving them apart does.
  np.testing.assert_allclose(gradient.sum(axis=-1), 0, atol=1e-7)
  assert np.abs(gradient).max() > 1e-3
  scores_BLE = 1 / (1 + np.exp(-logits_BLE.astype(float)))
  assert (scores_BLE / (scores_BLE.sum(axis=-1, keepdims=True) + 1e-20)).sum(axis=-1).max() < 1e-3


# --- loss-free bias ---


update_by_a_quarter = jax.jit(make_balancer("loss_free_bias:0.25").update)


def updated(bias_E, counts_E):
  (state,) = update_by_a_quarter((bias_E,), (np.asarray(counts_E, np.float32),))
  return np.asarray(state)


def test_bias_follows_the_sign_of_the_deviation():
  start_E = np.array([0.5, -0.5, 0.0, 1.0], np.float32)
  change_E = updated(start_E, [9, 1, 5, 5]) - start_E  # overloaded, underloaded, at the mean twice
  np.testing.assert_array_equal(change_E, [-0.25, 0.25, 0, 0])
  np.testing.assert_array_equal(updated(start_E, [5000, 1, 0, 0]) - start_E, [-0.25, 0.25, 0.25, 0.25])


@pytest.mark.parametrize("num_experts", [1, 7, 60])
def test_bias_rests_at_balance_and_without_tokens(num_experts):
  bias_E = np.linspace(-1, 1, num_experts).astype(np.float32)
  for count in (0, 1, 999, 123_457):
    np.testing.assert_array_equal(updated(bias_E, [count] * num_experts), bias_E)


def test_bias_takes_one_step_from_the_summed_counts():
  """Not the sum of one sign per micro-batch, which grows with accumulation and here points elsewhere."""
  micro_batches = np.array([[6, 0, 0], [0, 2, 4]])
  zero_E = np.zeros(3, np.float32)
  np.testing.assert_array_equal(updated(zero_E, micro_batches.sum(axis=0)), [-0.25, 0.25, 0])
  by_parts_E = sum(updated(zero_E, counts) for counts in micro_batches)
  np.testing.assert_array_equal(by_parts_E, [0, 0.25, 0])


def route_batch(router, logits_BLE, mask_BL, bias_E=None):
  """The routing as the layer makes it, one group per sequence."""
  one = lambda logits, mask: make_router(router, K)(logits, bias_E=bias_E, mask_T=mask)
  return to_batch(jax.vmap(one)(logits_BLE, mask_BL), *mask_BL.shape)


@functools.cache
def skewed_run(rate, num_steps=400):
  """A skewed router balanced by its bias alone: MaxVio [steps] and bias [steps, E]. Weights never move."""
  noise_BLE = np.random.default_rng(0).normal(size=(4, 32, 8)).astype(np.float32)
  logits_BLE = noise_BLE + np.linspace(2, -2, 8).astype(np.float32)
  mask_BL = np.ones((4, 32), bool)
  balancer = make_balancer(f"loss_free_bias:{rate}")

  def step(state, _):
    routing = route_batch("sigmoid_topk", logits_BLE, mask_BL, balancer.bias(state))
    observed = balancer.observe(routing)
    return balancer.update(state, observed), (stats.max_vio(observed[0]), balancer.bias(state))

  run = jax.jit(lambda state: jax.lax.scan(step, state, length=num_steps)[1])
  return jax.tree.map(np.asarray, run(balancer.init(8)))


def test_bias_balances_a_skewed_router():
  max_vio, bias = skewed_run(0.005)
  assert max_vio[0] > 1 and max_vio[-50:].max() < 0.2
  np.testing.assert_array_equal(bias[0], 0)  # it starts at zero, and acts from the second step on
  step = np.arange(len(bias))[:, None]
  assert (np.abs(bias) <= step * 0.005 * (1 + 1e-5)).all()


def test_without_a_bias_nothing_balances_it():
  max_vio, bias = skewed_run(0.0)
  assert max_vio.min() == max_vio.max() > 1 and not bias.any()


def test_bias_moves_no_loss_and_has_no_gradient():
  """The state reaches the choice only."""
  balancer = make_balancer("loss_free_bias,switch_loss:1:sequence")
  logits_BLE, mask_BL = logits_of(), np.ones((B, L), bool)

  @jax.jit
  @jax.grad
  def gradient(bias_E):
    routing = route_batch("sigmoid_topk", logits_BLE, mask_BL, bias_E)
    observed = balancer.observe(routing)
    return sum(balancer.losses((bias_E, ()), routing, observed).values()) + observed[0].sum()

  np.testing.assert_array_equal(gradient(np.linspace(0, 1, E).astype(np.float32)), 0)


def test_load_is_counted_before_capacity():
  """A collapsed router looks collapsed also where capacity keeps the same few tokens of every expert."""
  logits_BLE = logits_of(skew=0.1) + np.array([9, 0, 0, 0], np.float32)
  mask_BL = np.ones((B, L), bool)
  _, counts_E, _ = run(ROWS["loss_free_bias"], logits_BLE, mask_BL)
  assert counts_E[0].sum() == B * L * K and counts_E[0][0] == B * L
  assignment = jax.jit(jax.vmap(make_router("sigmoid_topk", K)))(logits_BLE).assignment
  kept_GA = kept_entries(assignment, capacity=2)
  kept_E = np.bincount(np.asarray(assignment.expert_A)[kept_GA], minlength=E)
  assert kept_E.max() <= 2 * B  # what a count after capacity would have seen
  assert stats.max_vio(jnp.asarray(counts_E[0])) == 1 > 0.5 > kept_E.max() / kept_E.mean() - 1


# --- combinations ---


def test_combined_losses_stand_side_by_side():
  names = [
    "switch_loss:0.5:sequence",
    "z_loss:0.25",
    "switch_loss:2:group",
    "gshard_loss:1:group",
    "switch_loss",
  ]
  balancer = make_balancer(",".join(names))
  routing = routing_of("softmax", logits_of(), MASK_BL, selected("softmax", logits_of(), MASK_BL))
  state, observed = balancer.init(E), balancer.observe(routing)
  found = balancer.losses(state, routing, observed)
  assert list(found) == ["switch_loss", "z_loss", "switch_loss#2", "gshard_loss", "switch_loss#3"]
  for spec, value in zip(names, found.values(), strict=True):
    alone = make_balancer(spec)
    (want,) = alone.losses(alone.init(E), routing, alone.observe(routing)).values()
    np.testing.assert_allclose(value, want, rtol=1e-6)


def test_combined_biases_add_and_states_stay_apart():
  balancer = make_balancer("loss_free_bias:0.5 + z_loss + loss_free_bias:0.125")
  counts_E = np.array([4, 0, 2], np.float32)
  start = balancer.init(3)
  state = jax.jit(balancer.update)(start, (counts_E, (), counts_E[::-1]))
  np.testing.assert_array_equal(state[0], [-0.5, 0.5, 0])
  np.testing.assert_array_equal(state[2], [0, 0.125, -0.125])
  np.testing.assert_array_equal(balancer.bias(state), [-0.5, 0.625, -0.125])
  np.testing.assert_array_equal(balancer.bias(start), 0)


def test_combination_without_a_bias_has_none():
  for spec in ("none", "z_loss,switch_loss", ""):
    balancer = make_balancer(spec)
    assert balancer.bias(balancer.init(4)) is None


@pytest.mark.parametrize(
  ("spec", "needs"),
  [
    ("switch_loss", True),
    ("gshard_loss", True),
    ("z_loss,switch_loss:0.1:global_batch", True),
    ("switch_loss:0.1:sequence,gshard_loss:0.1:group,switch_loss:0.1:micro_batch", False),
    ("loss_free_bias,z_loss", False),  # its counts are for the update, not for a loss
    ("none", False),
  ],
)
def test_only_global_losses_need_a_first_pass(spec, needs):
  assert make_balancer(spec).needs_step_stats == needs


def test_a_part_with_several_losses_names_each():
  two = Balancer(losses=lambda state, routing, step_stats: {"a": 1.0, "b": 2.0})
  one = Balancer(losses=lambda state, routing, step_stats: {"c": 3.0})
  found = combine({"two": two, "one": one}).losses(((), ()), None, ((), ()))
  assert found == {"two/a": 1.0, "two/b": 2.0, "one": 3.0}


@pytest.mark.parametrize(
  ("spec", "message"),
  [
    ("loss_free_bias:-0.1", "rate must be 0 or more, got -0.1"),
    ("switch_loss:0.1:layer", "scope must be one of sequence, group, micro_batch, buffer, global_batch, got 'layer'"),
    ("z_loss:0.1,swich_loss", "unknown balancer 'swich_loss': did you mean switch_loss"),
    ("none:1", "takes 0 values: none"),
  ],
)
def test_wrong_settings_are_one_line_errors(spec, message):
  with pytest.raises(InputError) as error:
    make_balancer(spec)
  assert message in str(error.value) and "\n" not in str(error.value)
