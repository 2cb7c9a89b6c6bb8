"""DeepSeek's losses. They balance experts within each sequence, devices, and what devices receive.

The expert-level loss of DeepSeekMoE (2401.06066, eq. 12-14) and DeepSeek-V2 (2405.04434, eq. 23-25) is
`switch_loss` over all K choices. V2's T tokens are those of one sequence, so it is `switch_loss:scope=sequence`.
"""

import jax
import jax.numpy as jnp

from moe_jax.errors import InputError
from moe_jax.ops.balancing.common import Balancer, normalized_scores
from moe_jax.ops.balancing.losses import all_choices, load_balancing
from moe_jax.ops.routing.common import select_top_k
from moe_jax.types import Array, BatchRouting


def best_scores(routing: BatchRouting) -> Array:
  """Returns 1 for the K experts with the highest scores, ignoring any bias and group limit. [B, L, E]"""
  batch, length, num_experts = routing.log_scores_BLE.shape
  scores_TE = routing.log_scores_BLE.reshape(-1, num_experts)
  expert_TK = select_top_k(scores_TE, None, routing.num_experts_per_token)
  onehot_TE = jax.nn.one_hot(expert_TK, num_experts, dtype=jnp.float32).sum(axis=1)
  return onehot_TE.reshape(batch, length, num_experts) * routing.mask_BL[..., None]


def sequence_loss(weight: float = 0.0001) -> Balancer:
  """DeepSeek-V3's complementary loss (2412.19437, eq. 17-20): weight * sum_e(f_e * p_e), computed per sequence.

  f_e is E / (K T) times the number of the sequence's T tokens that have expert e among their K highest scores,
  without the bias that changes the choice (and without the limit on groups). The loss therefore balances the
  scores themselves, whereas `switch_loss:scope=sequence` counts what was chosen. Without bias and limit, the two
  are equal. p_e, the paper's P_e, is the mean of the scores divided by their sum. The loss is 1 at balance.
  V3 used 0.0001 together with its bias.
  """
  return load_balancing(weight, "sequence", best_scores)


def by_device(values_BLE: Array, devices: int) -> Array:
  """Returns the sums over the experts of each device, [B, L, P]. A device holds E/P consecutive experts."""
  return values_BLE.reshape(*values_BLE.shape[:2], devices, -1).sum(axis=-1)


def _check_devices(name: str, devices: int):
  """Returns the `init` of a balancer that splits experts into `devices` equal parts."""
  if devices < 1:
    raise InputError(f"balancer {name}: devices must be 1 or more, got {devices}")

  def init(num_experts: int):
    if num_experts % devices:
      raise InputError(
        f"balancer {name}: devices must divide the number of experts {num_experts}, got {devices}"
      )
    return ()

  return init


def device_loss(weight: float = 0.05, devices: int = 4, scope: str = "sequence") -> Balancer:
  """Device-level balance loss (2401.06066, eq. 15-17; 2405.04434, eq. 26-28): weight * sum_d(f'_d * p'_d).

  f'_d is the mean of f_e = E / (K T) * count_e over the experts of device d. p'_d is the sum of their mean scores.
  Experts may differ in load as long as devices do not. The loss is 1 at balance, and P if all assignments go to
  one device. The experts are split into P equal parts in order; with as many devices as experts, the loss equals
  `switch_loss`. DeepSeekMoE 145B used a weight of 0.05 with 4 devices, V2 the same weight with 8. `scope` is the
  same as for `switch_loss`; V2 uses the sequence.
  """
  init = _check_devices("device_loss", devices)
  balancer = load_balancing(
    weight,
    scope,
    # The mean of f over E/P experts is P / (K T) times their count, so P times the device's share of all counts.
    count=lambda routing: by_device(all_choices(routing), devices),
    importance=lambda routing: by_device(normalized_scores(routing), devices),
  )
  return balancer._replace(init=init)


def communication_loss(
  weight: float = 0.02, devices: int = 8, devices_per_token: int = 3, scope: str = "sequence"
) -> Balancer:
  """Communication balance loss of DeepSeek-V2 (2405.04434, eq. 29-31): weight * sum_d(f''_d * p''_d).

  f''_d is P / (W T) times the number of tokens that have at least one expert on device d. p''_d is the sum of the
  mean scores of the device's experts. The loss balances what devices receive. What a token sends is already
  bounded by a router that is limited to W = `devices_per_token` devices. A token with several experts on one
  device is sent there once and counts once; `device_loss` counts every expert. The loss is 1 if each token reaches
  exactly W devices and each device receives W T / P tokens. It is w / W if tokens reach only w devices, evenly.
  """
  init = _check_devices("communication_loss", devices)
  if not 1 <= devices_per_token <= devices:
    raise InputError(
      f"balancer communication_loss: devices_per_token must be in [1, devices={devices}], got {devices_per_token}"
    )

  def count(routing: BatchRouting):
    sent_BLP = (by_device(routing.selected_BLE, devices) > 0).astype(jnp.float32)
    return sent_BLP, devices_per_token * routing.mask_BL.astype(jnp.float32)

  def load(sums):
    sent_UP, allowed_U = sums
    return sent_UP / jnp.maximum(allowed_U[:, None], 1.0)

  importance = lambda routing: by_device(normalized_scores(routing), devices)
  return load_balancing(weight, scope, count, load, importance)._replace(init=init)
