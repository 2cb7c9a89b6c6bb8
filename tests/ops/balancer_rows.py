"""The laws table of balancers: one row per method and option that changes what it computes."""

from collections.abc import Callable
from typing import Any, NamedTuple

from moe_jax.ops.balancing.losses import SCOPES
from tests.reference import balancing as reference

B, L, GROUP, E, K = 4, 6, 3, 4, 2  # shapes of the laws


class Row(NamedTuple):
  """One balancer under test.

  `loss(logits_BLE, mask_BL, step_logits_BLE, step_mask_BL)` is its loss as a slow loop in float64, weight
  included; the last two are of the whole optimizer step, which a loss may read but not differentiate.
  `observed(logits_BLE, mask_BL)` is what it counts, as a tree of numpy arrays; None if it observes nothing.
  """

  spec: str
  loss: Callable = lambda logits_BLE, mask_BL, step_logits_BLE, step_mask_BL: 0.0
  observed: Callable | None = None
  score: str = "softmax"  # how scores come from logits: a key of reference.SCORES
  fields: Callable[[Any], dict[str, Any]] = lambda logits_BLE: {}  # further fields of BatchRouting, with JAX
  has_gradient: bool = True
  permutable: bool = True  # experts have no order or groups
  depends_on_the_cut: bool = False  # micro-batches do not add up to the batch, by choice of scope
  # The spec with weight 1, if it is a load-balancing loss that is 1 at perfect balance; "" otherwise.
  unit: str = ""
  multiple_of: int = 1  # E must be a multiple of this for `unit`
  collapsed: bool = True  # and is then E/K where all tokens take the same K experts


def load_balancing(name, weight, scope, score):
  """A row of switch_loss (f over all choices) or gshard_loss (f over first choices)."""
  load_k = {"switch_loss": K, "gshard_loss": 1}[name]

  def counts(logits_BLE, mask_BL):
    return reference.selected(logits_BLE, mask_BL, load_k, score).sum(axis=(0, 1))

  def loss(logits_BLE, mask_BL, step_logits_BLE, step_mask_BL):
    of_step_E = counts(step_logits_BLE, step_mask_BL)
    return weight * reference.load_balancing_loss(logits_BLE, mask_BL, load_k, score, scope, GROUP, of_step_E)

  return Row(
    f"{name}:{weight}:{scope}",
    loss,
    counts if scope in ("buffer", "global_batch") else None,
    score,
    has_gradient=weight != 0,
    depends_on_the_cut=scope == "micro_batch",
    unit=f"{name}:1:{scope}",
  )


def counts_of_all_choices(logits_BLE, mask_BL):
  return reference.selected(logits_BLE, mask_BL, K, "sigmoid").sum(axis=(0, 1))


ROWS = {
  **{
    f"switch_{s}": load_balancing("switch_loss", 0.5, s, ("softmax", "sigmoid")[i % 2])
    for i, s in enumerate(SCOPES)
  },
  **{
    f"gshard_{s}": load_balancing("gshard_loss", 2, s, ("sigmoid", "softmax")[i % 2])
    for i, s in enumerate(SCOPES)
  },
  "zero_weight": load_balancing("switch_loss", 0, "group", "softmax"),
  "z_loss": Row("z_loss:0.5", lambda logits, mask, *step: 0.5 * reference.z_loss(logits, mask)),
  "zero_z": Row("z_loss:0", has_gradient=False),
  "loss_free_bias": Row(
    "loss_free_bias:0.25", observed=counts_of_all_choices, score="sigmoid", has_gradient=False
  ),
  "none": Row("none", has_gradient=False),
}
