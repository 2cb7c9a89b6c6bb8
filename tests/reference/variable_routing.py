"""Routers whose tokens use varying numbers of experts, or share a choice, as slow loops in numpy float64, and
their losses."""

import math

import numpy as np

from tests.reference.balancing import SCORES, selected
from tests.reference.routing import Entry, gshard_top2, pick, sigmoid, softmax, softmax_topk, token_choice


def mesh_top2(logits_TE, k, bias_E, mask_T, draw_T=None):
  """GShard's with Mesh-TensorFlow's threshold, and only what is sent takes a slot."""
  entries = gshard_top2(logits_TE, k, bias_E, mask_T, draw_T, threshold=0.2)
  return [entry._replace(holds_slot=entry.valid) for entry in entries]


def st_moe_topn(logits_TE, k, bias_E, mask_T, draw_TK=None, threshold=0.2):
  """Choice after choice: all tokens' best experts, then all second ones, ..."""
  entries = []
  for i in range(k):
    for t, logits_E in enumerate(np.asarray(logits_TE, np.float64)):
      probs_E = softmax(logits_E)
      chosen = pick(probs_E, bias_E, k)
      gate = probs_E[chosen[i]] / sum(probs_E[e] for e in chosen)
      sent = bool(mask_T[t])
      if i > 0 and draw_TK is not None and draw_TK[t][i - 1] >= min(1, gate / threshold):
        sent = False
      entries.append(Entry(t, chosen[i], gate, sent, sent))
  return entries


def top_p(p):
  def route(logits_TE, k, bias_E, mask_T, draw_T=None):
    entries = []
    for t, logits_E in enumerate(np.asarray(logits_TE, np.float64)):
      probs_E, total = softmax(logits_E), 0.0
      for e in pick(probs_E, bias_E, k):
        sent = bool(mask_T[t]) and not total > p
        entries.append(Entry(t, e, probs_E[e], sent, sent))
        total += probs_E[e]
    return entries

  return route


def sequence_mean(logits_TE, mask_T, sequence_T):
  """The logits of every token's sequence; zeros where all of it is padding."""
  mean_TE = np.zeros(np.shape(logits_TE))
  for t in range(len(mean_TE)):
    rows = [logits_TE[u] for u in range(len(mean_TE)) if sequence_T[u] == sequence_T[t] and mask_T[u]]
    for row in rows:
      mean_TE[t] += np.asarray(row, np.float64) / len(rows)
  return mean_TE


def sequence_level(logits_TE, k, bias_E, mask_T, draw_T=None, *, sequence):
  return softmax_topk(sequence_mean(logits_TE, mask_T, sequence), k, bias_E, mask_T)


def expert_threshold(most):
  """Every expert whose logit with bias is 0 or more, at most `most`, the largest first."""

  def route(logits_TE, k, bias_E, mask_T, draw=None):
    entries = []
    for t, logits_E in enumerate(np.asarray(logits_TE, np.float64)):
      weights_E = sigmoid(logits_E)
      for e in pick(logits_E, bias_E, most):
        valid = bool(mask_T[t]) and logits_E[e] + bias_E[e] >= 0
        entries.append(Entry(t, e, weights_E[e], valid, valid))
    return entries

  return route


def moe_plus_plus(num_experts, zeros, normalize=False):
  """Columns: `num_experts` feed-forward experts, `zeros` zero experts, then the others."""

  def route(logits_TE, k, bias_E, mask_T, draw_T=None):
    entries = []
    for t, logits_E in enumerate(np.asarray(logits_TE, np.float64)):
      probs_E = softmax(logits_E)
      chosen = pick(probs_E, bias_E, k)
      weights = [probs_E[e] for e in chosen]
      if normalize:
        weights = [0 if num_experts <= e < num_experts + zeros else probs_E[e] for e in chosen]
        weights = [w / sum(weights) if sum(weights) > 0 else 0.0 for w in weights]
      real = bool(mask_T[t])
      entries += [Entry(t, e, w, real, real) for e, w in zip(chosen, weights)]
    return entries

  return route


def longcat(scale):
  """All columns are alike for the choice: feed-forward experts and, behind them, identity experts."""

  weigh = lambda scores: [scale * s for s in scores]
  return lambda *args: token_choice(*args[:4], softmax, weigh)


def entropy(logits_BLE, mask_BL, score="softmax"):
  """The mean over valid tokens of -sum p log p, with p the scores over their sum."""
  values = []
  for index in zip(*np.nonzero(mask_BL)):
    scores_E = SCORES[score](logits_BLE[index])
    probs_E = [s / sum(scores_E) for s in scores_E]
    values.append(-sum(p * math.log(p) for p in probs_E))
  return sum(values) / max(len(values), 1)


def heterogeneous_loss(logits_BLE, mask_BL, step_logits_BLE, step_mask_BL, k, num_zero, tau):
  """2410.07348, eq. 7, with f of the whole step, times (tau E + Z) / (tau K)."""
  step_tokens, tokens = np.sum(step_mask_BL), np.sum(mask_BL)
  if tokens == 0:
    return 0.0
  counts_E = selected(step_logits_BLE, step_mask_BL, k, "softmax").sum(axis=(0, 1))
  num_experts, total = len(counts_E), 0.0
  for e in range(num_experts):
    eta = 1 if e < num_experts - num_zero else tau
    p = sum(softmax(logits_BLE[index])[e] for index in zip(*np.nonzero(mask_BL))) / tokens
    total += eta * counts_E[e] / step_tokens * p
  return total * (tau * (num_experts - num_zero) + num_zero) / (tau * k)
