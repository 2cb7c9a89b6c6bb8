"""Functions that routers share, and invalid settings."""

import jax
import numpy as np

from moe_jax.ops.routing import make_choice, selected_experts, to_batch
from moe_jax.ops.routing.common import in_groups
from moe_jax.types import RouterContext
from tests.ops.choosing import route
from tests.ops.router_laws import MASK_T, choice_of, entries_of, key_of, logits_of, route_row
from tests.ops.router_row import T
from tests.ops.router_rows import ROWS


def test_selected_experts_are_the_valid_entries_and_carry_no_gradient():
  row = ROWS["gshard_top2"]
  routing = route_row(row, logits_of(row), key=key_of(row), mask=MASK_T)
  want_TE = np.zeros((T, row.num_experts))
  for e in entries_of(routing.assignment):
    want_TE[e.token, e.expert] += e.valid
  assert 0 < want_TE.sum() < 2 * MASK_T.sum()  # some second choices are not sent
  np.testing.assert_array_equal(jax.jit(selected_experts)(routing), want_TE)


def test_llama4_takes_the_largest_logits_also_where_sigmoids_are_equal():
  """With a bias the sums of such sigmoids are equal, and the lower index is taken."""
  logits_TE, choice = np.float32([[30, 18, 40, 25, -3, 50]]), make_choice("llama4_topk", 6, 3)
  assignment = route(choice, logits_TE).assignment
  np.testing.assert_array_equal(assignment.expert_A, [5, 2, 0])
  np.testing.assert_allclose(assignment.weight_A, 1, rtol=1e-6)
  biased = route(choice, logits_TE, bias_E=np.zeros(6, np.float32)).assignment
  np.testing.assert_array_equal(biased.expert_A, [0, 1, 2])


def test_to_batch_regroups_tokens_in_order():
  row = ROWS["softmax_topk"]
  logits_GTE = np.stack([logits_of(row, g) for g in range(4)])
  mask_GT = np.stack([np.roll(MASK_T, g) for g in range(4)])

  @jax.jit
  def regroup(logits_GTE, mask_GT):
    routing = in_groups(choice_of(row).choose, logits_GTE, context=RouterContext(mask_GT))
    batch = to_batch(routing, 2, 2 * T, 2)
    assert batch.group_size == T
    return routing, batch

  routing, batch = regroup(logits_GTE, mask_GT)
  np.testing.assert_array_equal(batch.logits_BLE, logits_GTE.reshape(2, 2 * T, -1))
  np.testing.assert_array_equal(batch.mask_BL, mask_GT.reshape(2, 2 * T))
  # The compiler may compute the scores twice, and sum the 6 exponentials in another order.
  np.testing.assert_allclose(batch.log_scores_BLE[1, 3], routing.log_scores_TE[2, 3], rtol=6 * 2.0**-23)
  expert_GTK = np.asarray(routing.assignment.expert_A).reshape(4, T, 2)
  want_GTE = np.eye(row.num_experts)[expert_GTK].sum(axis=2) * mask_GT[..., None]
  np.testing.assert_array_equal(batch.selected_BLE, want_GTE.reshape(2, 2 * T, -1))
