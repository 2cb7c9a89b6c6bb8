"""The losses of 1701.06538, eq. 6-7 and 10-11, as slow loops in numpy float64."""

import math

from tests.reference.noisy_routing import normal_cdf
from tests.reference.routing import pick, softmax


def cv_squared(values_E):
  """(standard deviation / mean)^2, the deviation being that of the experts themselves."""
  mean = sum(values_E) / len(values_E)
  if mean == 0:
    return 0.0
  deviation = math.sqrt(sum((v - mean) ** 2 for v in values_E) / len(values_E))
  return (deviation / mean) ** 2


def gates(logits_E, k):
  """The softmax over the k best, 0 for all others."""
  chosen = pick(list(logits_E), [0.0] * len(logits_E), k)
  total = sum(math.exp(logits_E[e]) for e in chosen)
  return [math.exp(x) / total if e in chosen else 0.0 for e, x in enumerate(logits_E)]


def all_scores(logits_E, k):
  return softmax(logits_E)


def made_up_smooth_load(logits_E, k):
  """Something smooth in [0, 1]: the loss does not ask where its probabilities come from."""
  return [normal_cdf(x - 0.5) for x in logits_E]


def sums(values_of, logits_BLE, mask_BL, k):
  """(number of valid tokens, sum of their values)."""
  tokens, total_E = 0, [0.0] * len(logits_BLE[0][0])
  for logits_LE, mask_L in zip(logits_BLE, mask_BL):
    for logits_E, real in zip(logits_LE, mask_L):
      if real:
        tokens += 1
        total_E = [a + b for a, b in zip(total_E, values_of(logits_E, k))]
  return tokens, total_E


def cv_loss(values_of, logits_BLE, mask_BL, k, unit):
  """CV^2 of the sums over each `unit` tokens in order, weighted by valid tokens."""
  flat = [x for logits_LE in logits_BLE for x in logits_LE], [m for mask_L in mask_BL for m in mask_L]
  found = []
  for start in range(0, len(flat[0]), unit):
    logits, mask = (x[start : start + unit] for x in flat)
    tokens, total_E = sums(values_of, [logits], [mask], k)
    found.append((tokens, cv_squared(total_E)))
  return sum(n * loss for n, loss in found) / max(sum(n for n, _ in found), 1)
