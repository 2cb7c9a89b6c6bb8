"""Balancing losses as slow loops in numpy float64. Shares no code and no method with the package."""

import math

import numpy as np

from tests.reference.routing import pick, sigmoid, softmax

SCORES = {"softmax": softmax, "sigmoid": sigmoid}


def selected(logits_BLE, mask_BL, k, score):
  """[B, L, E], 1 where a valid token takes the expert as one of its `k` best."""
  chosen_BLE = np.zeros(np.shape(logits_BLE))
  for index in zip(*np.nonzero(mask_BL)):
    scores_E = SCORES[score](np.asarray(logits_BLE[index], np.float64))
    chosen_BLE[index][pick(scores_E, [0.0] * len(scores_E), k)] = 1
  return chosen_BLE


def _units(batch, length, group, scope):
  """The sets of (b, l) over each of which the scope balances."""
  size = {"sequence": length, "group": group}.get(scope, batch * length)
  tokens = [(b, t) for b in range(batch) for t in range(length)]
  return [tokens[start : start + size] for start in range(0, len(tokens), size)]


def load_balancing_loss(logits_BLE, mask_BL, k, score, scope, group, step_counts_E=None):
  """E * sum_e f_e * p_e: units weighted by their valid tokens. f has the `k` best choices of each token,
  p the scores over their sum. `step_counts_E`: what f is made of for the scopes `buffer` and `global_batch`."""
  batch, length, num_experts = np.shape(logits_BLE)
  total, num_tokens = 0.0, 0
  for unit in _units(batch, length, group, scope):
    count_E, prob_E, tokens = [0] * num_experts, [0.0] * num_experts, 0
    for b, t in unit:
      if not mask_BL[b][t]:
        continue
      tokens += 1
      scores_E = SCORES[score](logits_BLE[b][t])
      for e in pick(scores_E, [0.0] * num_experts, k):
        count_E[e] += 1
      for e in range(num_experts):
        prob_E[e] += scores_E[e] / sum(scores_E)
    if tokens == 0:
      continue
    if scope in ("buffer", "global_batch"):
      count_E = step_counts_E
    f_E = [c / sum(count_E) for c in count_E]
    p_E = [p / tokens for p in prob_E]
    total += tokens * num_experts * sum(f * p for f, p in zip(f_E, p_E))
    num_tokens += tokens
  return total / max(num_tokens, 1)


def z_loss(logits_BLE, mask_BL):
  """The mean over valid tokens of log(sum(exp(logits)))^2."""
  values = [math.log(sum(math.exp(x) for x in logits_BLE[i])) ** 2 for i in zip(*np.nonzero(mask_BL))]
  return sum(values) / max(len(values), 1)
