"""The laws table of balancers: one row per method and option that changes what it computes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.ops.balancing.losses import SCOPES
from tests.reference import balancing as reference
from tests.reference import bias as bias_reference
from tests.reference import deepseek_losses as further
from tests.reference import importance, relu_routing, variable_routing

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


def bias(spec):
  """A row of a balancer that counts choices and has no loss."""
  return Row(spec, observed=counts_of_all_choices, score="sigmoid", has_gradient=False)


def top_weights(logits_BLE):
  """The combine weights of the K best."""
  kept_BLE = jnp.where(logits_BLE >= jnp.sort(logits_BLE)[..., -K][..., None], logits_BLE, -jnp.inf)
  return {"weights_BLE": jax.nn.softmax(kept_BLE)}


def smooth_load(logits_BLE):
  return {"smooth_load_BLE": jax.scipy.special.ndtr(logits_BLE - 0.5)}


def cv(name, weight, scope, values_of, of="", fields=lambda logits_BLE: {}):
  """A row of importance_loss or load_loss, which balance sums of `values_of`. Their value at balance is 0.

  The loss of the whole step is differentiated in all its sums, so it takes the step to be the batch, as the laws do.
  """
  unit = {"sequence": L, "group": GROUP}.get(scope, B * L)

  def loss(logits_BLE, mask_BL, step_logits_BLE, step_mask_BL):
    return weight * importance.cv_loss(values_of, logits_BLE, mask_BL, K, unit)

  def observed(logits_BLE, mask_BL):
    tokens, sum_E = importance.sums(values_of, logits_BLE, mask_BL, K)
    return np.asarray(tokens), np.asarray(sum_E)

  return Row(
    f"{name}:{weight}:{scope}" + (f":{of}" if of else ""),
    loss,
    observed if scope in ("buffer", "global_batch") else None,
    fields=fields,
    has_gradient=weight != 0,
    depends_on_the_cut=scope == "micro_batch",
  )


def quantile_balancing(bins, cutoff, score):
  """A row of quantile_balancing; its state starts at 0, so required biases lie in [-1, 1]."""

  def observed(logits_BLE, mask_BL):
    scores = [reference.SCORES[score](logits_BLE[index]) for index in zip(*np.nonzero(mask_BL))]
    required_TE = bias_reference.required_biases(np.reshape(scores, (-1, E)), np.zeros(E), K, cutoff)
    return bias_reference.histogram(required_TE, -1, 1, bins), K * len(scores)

  spec = f"quantile_balancing:bins={bins}:cutoff={cutoff}"
  return Row(spec, observed=observed, score=score, has_gradient=False)


def expert_threshold(bins):
  """A row of expert_threshold; its thresholds start at 0, so the bins lie in [-8, 8]."""

  def observed(logits_BLE, mask_BL):
    return bias_reference.histogram(logits_BLE[mask_BL].reshape(-1, E), -8, 8, bins), K * mask_BL.sum()

  return Row(f"expert_threshold:bins={bins}", observed=observed, score="sigmoid", has_gradient=False)


def between_devices(name, weight, scope, score):
  """A row of device_loss or communication_loss, for two devices of which a token may reach both."""
  size = {"sequence": L, "group": GROUP}.get(scope, B * L)

  def arrivals(logits_BLE, mask_BL):
    tokens, selected_BLE = list(zip(*np.nonzero(mask_BL))), reference.selected(logits_BLE, mask_BL, K, score)
    if name == "device_loss":
      return np.array(further.expert_counts(selected_BLE, tokens))
    return np.array(further.device_arrivals(selected_BLE, tokens, 2))

  def loss(logits_BLE, mask_BL, step_logits_BLE, step_mask_BL):
    step = (step_mask_BL.sum(), arrivals(step_logits_BLE, step_mask_BL)) if scope == "global_batch" else None
    selected_BLE = reference.selected(logits_BLE, mask_BL, K, score)
    return weight * getattr(further, name)(logits_BLE, mask_BL, selected_BLE, 2, 2, size, score, step)

  def observed(logits_BLE, mask_BL):
    found = arrivals(logits_BLE, mask_BL)
    is_device_loss = name == "device_loss"
    return found.reshape(2, -1).sum(axis=1) if is_device_loss else (found, np.asarray(2 * mask_BL.sum()))

  options = "devices=2" if name == "device_loss" else "devices=2:devices_per_token=2"
  return Row(
    f"{name}:{weight}:{options}:scope={scope}",
    loss,
    observed if scope == "global_batch" else None,
    score,
    permutable=False,
    unit=f"{name}:1:{options}:scope={scope}" if name == "device_loss" else "",
    multiple_of=2,
    collapsed=False,
  )


def adaptive(weight, scope):
  """A row of adaptive_loss in its initial state, where it is switch_loss; two slots per expert and group."""
  fixed = load_balancing("switch_loss", weight, scope, "softmax")

  def observed(logits_BLE, mask_BL):
    selected_BLE = reference.selected(logits_BLE, mask_BL, K, "softmax")
    found = {"all": selected_BLE.sum(), "over": np.asarray(further.over_capacity(selected_BLE, GROUP, 2))}
    return found if fixed.observed is None else found | {"load": fixed.observed(logits_BLE, mask_BL)}

  spec = f"{weight}:scope={scope}:capacity_factor=1.25"  # ceil(1.25 * 3 * 2 / 4) = 2
  return fixed._replace(
    spec=f"adaptive_loss:{spec}", observed=observed, unit=f"adaptive_loss:1:scope={scope}"
  )


def remoe(start, scope):
  """A row of remoe_loss in its initial state, with counts that are not those of the weights."""

  def observed(logits_BLE, mask_BL):
    selected_BLE = reference.selected(logits_BLE, mask_BL, K, "softmax")
    return {"experts": selected_BLE.sum(axis=(0, 1)), "slots": np.asarray(K * mask_BL.sum())}

  def loss(logits_BLE, mask_BL, step_logits_BLE, step_mask_BL):
    counted = (step_logits_BLE, step_mask_BL) if scope == "global_batch" else (logits_BLE, mask_BL)
    counts_E = observed(*counted)["experts"]
    tokens = max(counted[1].sum(), 1)
    return start * relu_routing.loss(logits_BLE, mask_BL, counts_E, tokens, K)

  return Row(
    f"remoe_loss:{start}:scope={scope}",
    loss,
    observed,
    fields=lambda logits_BLE: {"weights_BLE": jax.nn.relu(logits_BLE)},
    depends_on_the_cut=scope == "micro_batch",
  )


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
  "entropy_loss": Row(
    "entropy_loss:0.5",
    lambda logits, mask, *step: 0.5 * variable_routing.entropy(logits, mask, "sigmoid"),
    score="sigmoid",
  ),
  "heterogeneous_loss": Row(
    "heterogeneous_loss:2:zero_computation=1:tau=0.5",
    lambda *logits_and_masks: 2 * variable_routing.heterogeneous_loss(*logits_and_masks, K, 1, 0.5),
    lambda logits, mask: reference.selected(logits, mask, K, "softmax").sum(axis=(0, 1)),
    permutable=False,
    unit="heterogeneous_loss:1:zero_computation=0",
  ),
  "st_moe_loss": load_balancing("gshard_loss", 0.5, "group", "softmax")._replace(
    spec="st_moe_loss:0.5", unit="st_moe_loss:1"
  ),
  "sequence_loss": Row(
    "sequence_loss:2",
    lambda logits, mask, *step: 2 * further.sequence_loss(logits, mask, K, "sigmoid"),
    score="sigmoid",
    unit="sequence_loss:1",
  ),
  "device_loss": between_devices("device_loss", 2, "sequence", "sigmoid"),
  "device_global_batch": between_devices("device_loss", 2, "global_batch", "softmax"),
  "communication_loss": between_devices("communication_loss", 2, "sequence", "softmax"),
  "communication_global_batch": between_devices("communication_loss", 2, "global_batch", "sigmoid"),
  "squared_deviation_loss": Row(
    "squared_deviation_loss:2:scope=group",
    lambda logits, mask, *step: 2 * further.deviation_of_importance(logits, mask, GROUP, "softmax"),
  ),
  "squared_deviation_of_load": Row(
    "squared_deviation_loss:2:of=load",
    lambda logits, mask, *step: 2 * further.deviation_of_counts(counts_of_all_choices(*step)) * mask.any(),
    counts_of_all_choices,
    score="sigmoid",
    has_gradient=False,
  ),
  "adaptive_loss": adaptive(0.5, "global_batch"),
  "adaptive_sequence": adaptive(2, "sequence"),
  "loss_free_bias": bias("loss_free_bias:0.25"),
  **{f"importance_{s}": cv("importance_loss", 0.5, s, importance.gates, fields=top_weights) for s in SCOPES},
  "importance_of_scores": cv("importance_loss", 0.5, "group", importance.all_scores, of="scores"),
  "load_group": cv("load_loss", 0.5, "group", importance.made_up_smooth_load, fields=smooth_load),
  "load_global_batch": cv("load_loss", 2, "global_batch", importance.made_up_smooth_load, fields=smooth_load),
  "zero_importance": cv("importance_loss", 0, "global_batch", importance.gates, fields=top_weights),
  "scheduled_bias": Row(
    "loss_free_bias:0.25:rule=rms:schedule=linear:steps=10",
    observed=counts_of_all_choices,
    score="sigmoid",
    has_gradient=False,
  ),
  "multiplicative_bias": bias("multiplicative_bias:0.25"),
  "remoe_micro_batch": remoe(0.5, "micro_batch"),
  "remoe_global_batch": remoe(2, "global_batch"),
  "smebu": bias("smebu:0.25"),
  "longcat_bias": Row(
    "longcat_bias:zero_computation=1",
    observed=lambda logits, mask: (
      reference.selected(logits, mask, K, "softmax").sum(axis=(0, 1)),
      np.asarray(mask.sum()),
      np.asarray(K * mask.sum()),
    ),
    has_gradient=False,
  ),
  "quantile_balancing": quantile_balancing(50, "next", "sigmoid"),
  "expert_threshold": expert_threshold(40),
  "quantile_cutoff": quantile_balancing(40, "quantile", "softmax"),
  "none": Row("none", has_gradient=False),
}
