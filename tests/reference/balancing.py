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


def units(mask_BL, size):
  """Valid tokens (b, t) in runs of `size`; runs without any are left out."""
  tokens = list(np.ndindex(*np.shape(mask_BL)))
  runs = [[i for i in tokens[s : s + size] if mask_BL[i[0]][i[1]]] for s in range(0, len(tokens), size)]
  return [run for run in runs if run]


def mean_over_tokens(units, loss_of_unit):
  num_tokens = sum(len(unit) for unit in units)
  return sum(len(unit) * loss_of_unit(unit) for unit in units) / max(num_tokens, 1)


def mean_score(logits_BLE, unit, e, score):
  """p_e: the mean over tokens of expert e's score over the sum of all scores."""
  shares = [SCORES[score](logits_BLE[b][t]) for b, t in unit]
  return sum(scores_E[e] / sum(scores_E) for scores_E in shares) / len(unit)


def load_balancing_loss(logits_BLE, mask_BL, k, score, scope, group, step_counts_E=None):
  """E * sum_e f_e * p_e: units weighted by their valid tokens. f has the `k` best choices of each token,
  p the scores over their sum. `step_counts_E`: what f is made of for the scopes `buffer` and `global_batch`."""
  batch, length, num_experts = np.shape(logits_BLE)

  def loss(unit):
    count_E = [0] * num_experts
    for b, t in unit:
      for e in pick(SCORES[score](logits_BLE[b][t]), [0.0] * num_experts, k):
        count_E[e] += 1
    if scope in ("buffer", "global_batch"):
      count_E = step_counts_E
    f_E = [c / sum(count_E) for c in count_E]
    return num_experts * sum(f * mean_score(logits_BLE, unit, e, score) for e, f in enumerate(f_E))

  size = {"sequence": length, "group": group}.get(scope, batch * length)
  return mean_over_tokens(units(mask_BL, size), loss)


def z_loss(logits_BLE, mask_BL):
  """The mean over valid tokens of log(sum(exp(logits)))^2."""
  values = [math.log(sum(math.exp(x) for x in logits_BLE[i])) ** 2 for i in zip(*np.nonzero(mask_BL))]
  return sum(values) / max(len(values), 1)
