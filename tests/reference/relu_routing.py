"""ReMoE (2412.14711) as slow loops in numpy float64."""

import numpy as np

from tests.reference.routing import Entry


def relu(logits_E):
  return [max(0.0, float(x)) for x in logits_E]


def remoe(logits_TE, k, bias_E, mask_T, draw_T=None, limit=None):
  """An entry for every expert; with a limit, for the experts with the largest logits, best first."""
  entries = []
  for t, logits_E in enumerate(np.asarray(logits_TE, np.float64)):
    order = range(len(logits_E))
    if limit:
      order = sorted(order, key=lambda e: (-logits_E[e], e))[:limit]
    for e in order:
      sent = bool(mask_T[t]) and logits_E[e] > 0
      entries.append(Entry(t, e, relu(logits_E)[e], sent, sent))
  return entries


def loss(logits_BLE, mask_BL, counts_E, counted_tokens, k):
  """The L1 norm of the weights, each times how much more than its share its expert has; with lambda = 1."""
  num_experts, total, tokens = logits_BLE.shape[-1], 0.0, 0
  for index in zip(*np.nonzero(mask_BL)):
    tokens += 1
    for e, weight in enumerate(relu(logits_BLE[index])):
      total += num_experts / (k * counted_tokens) * counts_E[e] * weight
  return total / max(tokens, 1)


def next_coefficient(coefficient, counts_E, tokens, k, factor):
  sparsity, target = 1 - sum(counts_E) / (tokens * len(counts_E)), 1 - k / len(counts_E)
  return coefficient * factor if sparsity < target else coefficient / factor
