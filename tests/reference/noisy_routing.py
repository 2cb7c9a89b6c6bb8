"""Noisy routers as slow loops over tokens and experts in numpy float64, from the papers' formulas.

The noise is given, drawn by the caller; None is none. Probabilities come from the error function of `math`.
"""

import math

import numpy as np

from tests.reference.routing import Entry, pick, softmax


def softplus(x):
  return math.log1p(math.exp(x)) if x < 30 else x


def normal_cdf(x):
  return 0.5 * math.erfc(-x / math.sqrt(2))


def kth_excluding(values, k, i):
  """The k-th highest of `values` without entry i; minus infinity where there are fewer."""
  others = sorted((v for j, v in enumerate(values) if j != i), reverse=True)
  return others[k - 1] if k <= len(others) else -math.inf


def noisy_logits(logits_E, side_E, draw_E, min_std):
  """(noisy logits, standard deviations) of one token: 1701.06538, eq. 4."""
  stds = [softplus(s) + min_std for s in side_E]
  draws = [0.0] * len(stds) if draw_E is None else [float(z) for z in draw_E]
  return [x + std * z for x, std, z in zip(logits_E, stds, draws)], stds


def win_probabilities(logits_E, noisy_E, stds, k):
  """P(x, i) of every expert of one token: 1701.06538, eq. 9."""
  return [
    normal_cdf((x - kth_excluding(noisy_E, k, i)) / std) for i, (x, std) in enumerate(zip(logits_E, stds))
  ]


def win_probabilities_vmoe(logits_E, noisy_E, std, k):
  """The same with the k-th highest of all experts, i included, as V-MoE's code has it."""
  threshold = sorted(noisy_E, reverse=True)[k - 1]
  return [1 - normal_cdf((threshold - x) / std) for x in logits_E]


def gate(noisy_E, bias_E, k):
  """(chosen, weights): the k best by softmax plus bias, and the softmax that gives all others nothing."""
  chosen = pick(softmax(noisy_E), bias_E, k)
  kept = [x if e in chosen else -math.inf for e, x in enumerate(noisy_E)]
  weights_E = softmax(kept)
  return chosen, [weights_E[e] for e in chosen]


def _entries(t, chosen, weights, mask_T):
  return [Entry(t, e, w, bool(mask_T[t]), bool(mask_T[t])) for e, w in zip(chosen, weights)]


def _row(draw_TE, t):
  return None if draw_TE is None else draw_TE[t]


def noisy_topk(logits_TE, k, bias_E, mask_T, draw_TE, noise_logits_TE, min_std=0.01):
  entries = []
  for t, logits_E in enumerate(np.asarray(logits_TE, np.float64)):
    noisy_E, _ = noisy_logits(logits_E, np.asarray(noise_logits_TE[t], float), _row(draw_TE, t), min_std)
    entries += _entries(t, *gate(noisy_E, bias_E, k), mask_T)
  return entries


def noisy_topk_load(logits_TE, k, draw_TE, noise_logits_TE, min_std=0.01):
  """P(x, i), [T, E]."""
  rows = []
  for t, logits_E in enumerate(np.asarray(logits_TE, np.float64)):
    noisy_E, stds = noisy_logits(logits_E, np.asarray(noise_logits_TE[t], float), _row(draw_TE, t), min_std)
    rows.append(win_probabilities(logits_E, noisy_E, stds, k))
  return np.array(rows)


def _vmoe_noisy(logits_E, draw_E, noise):
  std = noise / len(logits_E)
  draws = [0.0] * len(logits_E) if draw_E is None else [float(z) for z in draw_E]
  return [x + std * z for x, z in zip(logits_E, draws)], std


def vmoe_topk(logits_TE, k, bias_E, mask_T, draw_TE, noise=1.0):
  entries = []
  for t, logits_E in enumerate(np.asarray(logits_TE, np.float64)):
    probs_E = softmax(_vmoe_noisy(logits_E, _row(draw_TE, t), noise)[0])
    chosen = pick(probs_E, bias_E, k)
    entries += _entries(t, chosen, [probs_E[e] for e in chosen], mask_T)
  return entries


def vmoe_topk_load(logits_TE, k, draw_TE, noise=1.0):
  """[T, E]."""
  rows = []
  for t, logits_E in enumerate(np.asarray(logits_TE, np.float64)):
    noisy_E, std = _vmoe_noisy(logits_E, _row(draw_TE, t), noise)
    rows.append(win_probabilities_vmoe(logits_E, noisy_E, std, k))
  return np.array(rows)


def _two_levels(t, logits_TE, logits_TP, noise_logits_TE, noise_logits_TP, draws, min_std):
  """(logits, noisy logits, stds) of the parts for token t, and a list with the same for each part's experts."""
  parts = len(logits_TP[t])
  draw_TP, draw_TE = (None, None) if draws is None else draws

  def level(logits_TX, noise_logits_TX, draw_TX, of=slice(None)):
    clean = [float(x) for x in logits_TX[t][of]]
    if noise_logits_TX is None:
      return clean, clean, None
    noise_logits = [float(x) for x in noise_logits_TX[t][of]]
    return clean, *noisy_logits(clean, noise_logits, None if draw_TX is None else draw_TX[t][of], min_std)

  size = len(logits_TE[t]) // parts
  inners = [level(logits_TE, noise_logits_TE, draw_TE, slice(p * size, (p + 1) * size)) for p in range(parts)]
  return level(logits_TP, noise_logits_TP, draw_TP), inners


def hierarchical_topk(
  logits_TE,
  k,
  bias_E,
  mask_T,
  draws,
  logits_TP,
  noise_logits_TE=None,
  noise_logits_TP=None,
  *,
  groups_per_token,
  min_std=0.01,
):
  """1701.06538, eq. 12. `draws`: (of the parts [T, P], of the experts [T, E])."""
  entries, bias_PO = [], np.reshape(bias_E, (len(logits_TP[0]), -1))
  for t in range(len(logits_TE)):
    outer, inners = _two_levels(t, logits_TE, logits_TP, noise_logits_TE, noise_logits_TP, draws, min_std)
    for p, part_weight in zip(*gate(outer[1], bias_PO.mean(axis=1), groups_per_token)):
      chosen, weights = gate(inners[p][1], bias_PO[p], k // groups_per_token)
      experts = [p * bias_PO.shape[1] + o for o in chosen]
      entries += _entries(t, experts, [part_weight * w for w in weights], mask_T)
  return entries


def hierarchical_topk_load(
  logits_TE, k, draws, logits_TP, noise_logits_TE, noise_logits_TP, groups_per_token, min_std=0.01
):
  """The product of both levels' P(x, i), [T, E]."""
  rows = []
  for t in range(len(logits_TE)):
    outer, inners = _two_levels(t, logits_TE, logits_TP, noise_logits_TE, noise_logits_TP, draws, min_std)
    p_P = win_probabilities(*outer, groups_per_token)
    rows.append(
      [p * q for p, inner in zip(p_P, inners) for q in win_probabilities(*inner, k // groups_per_token)]
    )
  return np.array(rows)
