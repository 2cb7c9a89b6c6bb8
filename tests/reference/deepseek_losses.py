"""Further balancing losses as slow loops in numpy float64, from the papers' formulas: DeepSeek's, the squared
deviation, the buffer of 2501.11873 and the adaptive weight. Shares no code and no method with the package."""

import math

from tests.reference.balancing import load_balancing_loss, mean_over_tokens, mean_score, units


def sequence_loss(logits_BLE, mask_BL, k, score):
  """2412.19437, eq. 17-20, per sequence of T valid tokens; sequences weighted by their tokens. Its f, E / (K T) times
  how many tokens have the expert among their best, is E times the expert's share of these K T choices."""
  return load_balancing_loss(logits_BLE, mask_BL, k, score, "sequence", None)


def device_of(e, num_experts, devices):
  """Device d holds experts d * E/P, ..., (d + 1) * E/P - 1."""
  return next(d for d in range(devices) if e < (d + 1) * num_experts // devices)


def expert_counts(selected_BLE, tokens):
  """For each expert how many of `tokens` chose it."""
  return [sum(selected_BLE[b][t][e] for b, t in tokens) for e in range(len(selected_BLE[0][0]))]


def device_arrivals(selected_BLE, tokens, devices):
  """For each device how many of `tokens` send anything there."""
  arrivals, num_experts = [0] * devices, len(selected_BLE[0][0])
  for b, t in tokens:
    for d in {device_of(e, num_experts, devices) for e in range(num_experts) if selected_BLE[b][t][e]}:
      arrivals[d] += 1
  return arrivals


def device_loss(logits_BLE, mask_BL, selected_BLE, k, devices, size, score, step=None):
  """2401.06066, eq. 15-17: f' is the mean of f over the experts of a device, p' the sum of p.

  `step`: (tokens, counts_E) of the whole step, from which f is then taken; None: from the unit."""
  num_experts = len(logits_BLE[0][0])

  def loss(unit):
    tokens, counts_E = step or (len(unit), expert_counts(selected_BLE, unit))
    total = 0.0
    for d in range(devices):
      experts = [e for e in range(num_experts) if device_of(e, num_experts, devices) == d]
      f = sum(num_experts / (k * tokens) * counts_E[e] for e in experts) / len(experts)
      total += f * sum(mean_score(logits_BLE, unit, e, score) for e in experts)
    return total

  return mean_over_tokens(units(mask_BL, size), loss)


def communication_loss(logits_BLE, mask_BL, selected_BLE, m, devices, size, score, step=None):
  """2405.04434, eq. 29-31. `step`: (tokens, tokens that reach each device) of the whole step, for f''."""
  num_experts = len(logits_BLE[0][0])

  def loss(unit):
    tokens, sent_P = step or (len(unit), device_arrivals(selected_BLE, unit, devices))
    total = 0.0
    for e in range(num_experts):
      f = devices / (m * tokens) * sent_P[device_of(e, num_experts, devices)]
      total += f * mean_score(logits_BLE, unit, e, score)
    return total

  return mean_over_tokens(units(mask_BL, size), loss)


def deviation_of_counts(counts_E):
  """sum_e(c_e / A - 1/E)^2, A the number of assignments; 0 for none."""
  total = sum(counts_E)
  return sum((c / total - 1 / len(counts_E)) ** 2 for c in counts_E) if total else 0.0


def deviation_of_importance(logits_BLE, mask_BL, size, score):
  """E * sum_e(p_e - 1/E)^2 per unit of `size` tokens."""
  num_experts = len(logits_BLE[0][0])
  loss = lambda unit: sum(
    num_experts * (mean_score(logits_BLE, unit, e, score) - 1 / num_experts) ** 2 for e in range(num_experts)
  )
  return mean_over_tokens(units(mask_BL, size), loss)


def buffer_losses(counts_JE, probs_JE):
  """2501.11873 under gradient accumulation: for each of J micro-batches E * sum_e(f_e * p_e), f from the counts in
  a buffer that is empty when the step begins and has the micro-batch's own already; p is the micro-batch's."""
  buffer_E, found = [0.0] * len(counts_JE[0]), []
  for counts_E, probs_E in zip(counts_JE, probs_JE):
    buffer_E = [b + c for b, c in zip(buffer_E, counts_E)]
    f_E = [b / sum(buffer_E) for b in buffer_E]
    found.append(len(f_E) * sum(f * p for f, p in zip(f_E, probs_E)))
  return found


def over_capacity(selected_BLE, group, slots):
  """Assignments that find the `slots` of their expert taken by earlier tokens of their group."""
  over, tokens = 0, [token_E for sequence in selected_BLE for token_E in sequence]
  for start in range(0, len(tokens), group):
    taken_E = [0] * len(tokens[0])
    for token_E in tokens[start : start + group]:
      for e in range(len(token_E)):
        if token_E[e]:
          over += taken_E[e] >= slots
          taken_E[e] += 1
  return over


def adaptive_scales(ratios, max_ratio, min_ratio, rate, average):
  """The scale after each step, as axlearn's AdaptiveLoadBalanceLoss computes it from the ratio of each step."""
  mean, log_scale, scales = 0.0, 0.0, []
  for step, ratio in enumerate(ratios):
    share = max(average, 1 / (step + 1))
    mean = (1 - share) * mean + share * ratio
    if mean > max_ratio:
      log_scale += rate
    elif mean < min_ratio:
      log_scale -= rate
    scales.append(math.exp(log_scale))
  return scales
