"""A hierarchical mixture of experts: one softmax chooses parts of the experts, another one experts within them.

Scores: the product of both softmaxes, over all parts and experts and without noise.
Bias: added to the softmax within a part; its mean over the experts of a part is added to the softmax over
parts, because otherwise it could move no load between parts.
Smooth load: the product of the probabilities at both levels, one number per token and expert. Eq. 14 of
1701.06538 multiplies sums over the batch instead, which would not add up over micro-batches.
"""

from typing import NamedTuple

import jax

from moe_jax.errors import InputError, require_option
from moe_jax.ops.routing.common import Choice, select_top_k, take_experts, token_major
from moe_jax.ops.routing.noisy import add_noise, learned_std, real_tokens, win_probability
from moe_jax.types import Array, ExpertScale, RouterContext, Routing


def hierarchical_topk(
  num_experts: int,
  num_experts_per_token: int,
  groups: int = 4,
  groups_per_token: int = 2,
  noise: str = "learned",
  min_std: float = 0.01,
) -> Choice:
  """Hierarchical mixture of experts (1701.06538, appendix B): weight = weight of the part * weight within it.

  The E experts in order are cut into P parts of O experts each. A token takes W parts, and in each of them K / W of
  the experts (2 and 2 in the paper). Both weights are softmaxes over what was chosen, so the
  weights of a token sum to 1, and a level that chooses only one thing gets no gradient from them. Logits of
  experts are compared within a part only. With one part this is `noisy_topk`.

  The choice is `choose(logits_TE, logits_TP, noise_logits_TE, noise_logits_TP, context)`, or
  `choose(logits_TE, logits_TP, context)` with noise=none. Each argument is a projection of its own:
    logits_TE, logits_TP: of the experts and of the parts, without noise.
    noise_logits_TE, noise_logits_TP: give the standard deviations of their noise, as in `noisy_topk`.

  Args:
    groups: P.
    groups_per_token: W.
    noise: `learned` is the noise of `noisy_topk` at both levels; `none` has neither noise nor a smooth load.
    min_std: added to the standard deviations, as in `noisy_topk`.

  Raises:
    InputError: P does not divide E, W does not divide K, or a part has too few experts.
  """
  _check(num_experts, num_experts_per_token, groups, groups_per_token, noise, min_std)
  inner_k = num_experts_per_token // groups_per_token

  def noisy(
    logits_TE: Array, logits_TP: Array, noise_logits_TE: Array, noise_logits_TP: Array, context: RouterContext
  ) -> Routing:
    key_P, key_E = (None, None) if context.key is None else jax.random.split(context.key)
    real = lambda x: real_tokens(x, context.mask)
    parts = _noisy(real(logits_TP), learned_std(real(noise_logits_TP), min_std), key_P)
    experts = _noisy(real(logits_TE), learned_std(real(noise_logits_TE), min_std), key_E)
    return _two_levels(logits_TE, logits_TP, experts, parts, inner_k, groups_per_token, context)

  def quiet(logits_TE: Array, logits_TP: Array, context: RouterContext) -> Routing:
    parts, experts = (_noisy(real_tokens(x, context.mask), None, None) for x in (logits_TP, logits_TE))
    return _two_levels(logits_TE, logits_TP, experts, parts, inner_k, groups_per_token, context)

  # Given choices are of experts, and it also chooses parts.
  if noise == "none":
    # Not zero_init: without noise, equal logits send every token to the first experts.
    return Choice(quiet, replays=False)
  return Choice(noisy, gives_smooth_load=True, zero_init=True, replays=False)


class _NoisyLogits(NamedTuple):
  clean_TX: Array
  noisy_TX: Array
  std_TX: Array | None  # None: no noise


class _Selection(NamedTuple):
  index_TY: Array  # best first
  weight_TY: Array  # sum to 1
  win_TX: Array | None  # the smooth load


def _noisy(clean_TX: Array, std_TX: Array | None, key: Array | None) -> _NoisyLogits:
  return _NoisyLogits(clean_TX, clean_TX if std_TX is None else add_noise(clean_TX, std_TX, key), std_TX)


def _two_levels(
  logits_TE: Array,
  logits_TP: Array,
  experts: _NoisyLogits,
  parts: _NoisyLogits,
  inner_k: int,
  parts_per_token: int,
  context: RouterContext,
) -> Routing:
  """Selects parts, and experts within them. The scores come from `logits_TE` and `logits_TP`."""
  num_experts, num_parts = logits_TE.shape[-1], logits_TP.shape[-1]
  by_part = lambda x_TE: x_TE.reshape(-1, num_parts, num_experts // num_parts)
  bias_PO = jax.tree.map(lambda b_E: b_E.reshape(num_parts, -1), context.bias_E)
  bias_P = jax.tree.map(lambda b_PO: b_PO.mean(axis=-1), bias_PO)

  outer = _select(parts, bias_P, parts_per_token)
  # Selects within every part, taken or not: static shapes, and cheap.
  within = jax.vmap(lambda logits, bias_O: _select(logits, bias_O, inner_k), in_axes=(1, 0), out_axes=1)
  inner = within(jax.tree.map(by_part, experts), bias_PO)

  of_taken_parts = jax.vmap(take_experts, in_axes=(2, None), out_axes=2)  # [T, P, Y] -> [T, W, Y]
  member_TWY = of_taken_parts(inner.index_TY, outer.index_TY)
  expert_TWY = outer.index_TY[:, :, None] * (num_experts // num_parts) + member_TWY
  weight_TWY = outer.weight_TY[:, :, None] * of_taken_parts(inner.weight_TY, outer.index_TY)
  flat = lambda x_TWY: x_TWY.reshape(-1, parts_per_token * inner_k)
  smooth_TPO = None if outer.win_TX is None else outer.win_TX[:, :, None] * inner.win_TX
  return Routing(
    logits_TE,
    _log_scores(by_part(logits_TE), logits_TP),
    context.mask,
    token_major(flat(expert_TWY), flat(weight_TWY), context.mask),
    smooth_load_TE=None if smooth_TPO is None else smooth_TPO.reshape(logits_TE.shape),
  )


def _select(logits: _NoisyLogits, bias_X: Array | ExpertScale | None, k: int) -> _Selection:
  """The k best of X things."""
  clean_TX, noisy_TX, std_TX = logits
  index_TY = select_top_k(jax.nn.softmax(noisy_TX, axis=-1), bias_X, k)
  weight_TY = jax.nn.softmax(take_experts(noisy_TX, index_TY), axis=-1)
  win_TX = None if std_TX is None else win_probability(clean_TX, noisy_TX, std_TX, k)
  return _Selection(index_TY, weight_TY, win_TX)


def _log_scores(logits_TPO: Array, logits_TP: Array) -> Array:
  joint_TPO = jax.nn.log_softmax(logits_TP, axis=-1)[:, :, None] + jax.nn.log_softmax(logits_TPO, axis=-1)
  return joint_TPO.reshape(logits_TP.shape[0], -1)


def _check(num_experts: int, k: int, groups: int, groups_per_token: int, noise: str, min_std: float) -> None:
  name = "router hierarchical_topk"
  require_option(name, "noise", noise, ("learned", "none"))
  if not min_std > 0:
    raise InputError(f"{name}: min_std must be above 0, got {min_std}")
  if groups < 1 or num_experts % groups:
    raise InputError(f"{name}: groups must divide num_experts={num_experts}, got {groups}")
  if not 1 <= groups_per_token <= groups:
    raise InputError(f"{name}: groups_per_token must be in [1, groups={groups}], got {groups_per_token}")
  if k % groups_per_token:
    raise InputError(
      f"{name}: groups_per_token must divide num_experts_per_token={k}, got {groups_per_token}"
    )
  if k // groups_per_token > num_experts // groups:
    raise InputError(
      f"{name}: num_experts_per_token={k} takes {k // groups_per_token} experts in each of {groups_per_token} "
      f"groups, and a group has {num_experts // groups}; use fewer, or more groups_per_token"
    )
