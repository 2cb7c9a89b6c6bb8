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
  """DeepSeek-V3's complementary loss (2412.19437, eq. 17-20): weight * sum_e(f_e * P_e), computed per sequence.

  f_e is E / (K T) times the number of the sequence's T tokens that have expert e among their K highest scores,
  without the bias that changes the choice (and without the limit on groups). The loss therefore balances the
  scores themselves, whereas `switch_loss:scope=sequence` counts what was chosen. Without bias and limit, the two
  are equal. P_e is the mean of the scores divided by their sum. The loss is 1 at balance. V3 used 0.0001 together
  with its bias.
  """
  return load_balancing(weight, "sequence", best_scores)


def by_device(values_BLE: Array, devices: int) -> Array:
  """[B, L, D]: sums over the experts of each device, which holds E/D neighbours."""
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
  """Device-level balance (2401.06066, eq. 15-17; 2405.04434, eq. 26-28): weight * sum_d(f'_d * P'_d).

  f'_d is the mean of f_e = E / (K T) * count_e over the experts of device d, P'_d the sum of their mean scores:
  experts may differ in load as long as devices do not. 1 at balance, D where all goes to one device. Experts are
  cut into equal parts in order; with as many devices as experts it is `switch_loss`. DeepSeekMoE 145B used 0.05
  with 4 devices, V2 the same weight with 8. `scope` as for `switch_loss`; V2's is the sequence.
  """
  init = _check_devices("device_loss", devices)
  balancer = load_balancing(
    weight,
    scope,
    # The mean of f over E/D experts is D / (K T) * their count: D times the device's share of all counts.
    count=lambda routing: by_device(all_choices(routing), devices),
    importance=lambda routing: by_device(normalized_scores(routing), devices),
  )
  return balancer._replace(init=init)


def communication_loss(
  weight: float = 0.02, devices: int = 8, devices_per_token: int = 3, scope: str = "sequence"
) -> Balancer:
  """Communication balance of DeepSeek-V2 (2405.04434, eq. 29-31): weight * sum_d(f''_d * P''_d).

  f''_d = D / (M T) * the number of tokens that send anything to device d, P''_d the sum of the mean scores of its
  experts. It balances what devices receive: what a token sends is bounded already, by a router that is limited
  to M = `devices_per_token` devices. A token with several experts on a device travels there once and counts once,
  which is the difference from `device_loss`. 1 where each token reaches exactly M devices and each device gets
  M T / D tokens; m / M where tokens reach only m devices.
  """
  init = _check_devices("communication_loss", devices)
  if not 1 <= devices_per_token <= devices:
    raise InputError(
      f"balancer communication_loss: devices_per_token must be in [1, devices={devices}], got {devices_per_token}"
    )

  def count(routing: BatchRouting):
    sent_BLD = (by_device(routing.selected_BLE, devices) > 0).astype(jnp.float32)
    return sent_BLD, devices_per_token * routing.mask_BL.astype(jnp.float32)

  def load(sums_U):
    sent_UD, allowed_U = sums_U
    return sent_UD / jnp.maximum(allowed_U[:, None], 1.0)

  importance = lambda routing: by_device(normalized_scores(routing), devices)
  return load_balancing(weight, scope, count, load, importance)._replace(init=init)
