"""Balancers that move the choice, as slow loops in numpy float64. Shares no code and no method with the package."""

import math

import numpy as np


def share_of_rate(schedule, steps, step):
  """What is left of the rate at optimizer step `step`, counted from 0."""
  if schedule == "constant":
    return 1.0
  if step >= steps:
    return 0.0
  return {
    "stop": 1.0,
    "linear": (steps - step) / steps,
    "cosine": (1 + math.cos(math.pi * step / steps)) / 2,
  }[schedule]


def moves(counts_E, rule):
  """By how many times the rate each bias moves: up where tokens are missing."""
  mean = sum(counts_E) / len(counts_E)
  errors = [mean - count for count in counts_E]
  if rule == "sign":
    return [1 if error > 0 else -1 if error < 0 else 0 for error in errors]
  size = mean if rule == "proportional" else math.sqrt(sum(e * e for e in errors) / len(errors))
  return [error / size if size else 0.0 for error in errors]


def required_biases(scores_TE, bias_E, k, cutoff):
  """[T, E]: the bias with which each expert would stand exactly at the token's cutoff."""
  scores_TE, bias_E = np.asarray(scores_TE, np.float64), np.asarray(bias_E, np.float64)
  num_experts = len(bias_E)
  rows = []
  for scores_E in scores_TE:
    biased_E = scores_E + bias_E
    if cutoff == "quantile":
      limit = np.quantile(biased_E, 1 - k / num_experts)
    else:
      limit = sorted(biased_E, reverse=True)[min(k, num_experts - 1)]
    rows.append([limit - score for score in scores_E])
  return np.array(rows).reshape(-1, num_experts)


def histogram(values_TE, low, high, bins):
  """[E, bins]: how many of an expert's values lie in each uniform bin; those outside count in the end bins."""
  count_EQ = np.zeros((values_TE.shape[1], bins))
  for row in values_TE:
    for e, value in enumerate(row):
      count_EQ[e, min(max(math.floor((value - low) / (high - low) * bins), 0), bins - 1)] += 1
  return count_EQ


def balancing_biases(required_TE, k):
  """[E]: of each expert's T sorted values the one of rank T * K / E, rounded up."""
  num_tokens, num_experts = required_TE.shape
  rank = -(-num_tokens * k // num_experts)
  return np.array([sorted(column)[rank - 1] for column in required_TE.T])


def smebu(counts_of_steps, rate, kappa, beta):
  """2602.17004: the bias [steps, E] after each step, from the counts [steps, E] of these steps."""
  num_experts = len(counts_of_steps[0])
  bias, momentum, rows = [0.0] * num_experts, [0.0] * num_experts, []
  for counts_E in counts_of_steps:
    mean = sum(counts_E) / num_experts
    violations = [(mean - count) / mean if mean else 0.0 for count in counts_E]
    moves = [rate * math.tanh(kappa * violation) for violation in violations]
    centre = sum(moves) / num_experts
    for e in range(num_experts):
      momentum[e] = beta * momentum[e] + (1 - beta) * (moves[e] - centre)
      bias[e] += momentum[e]
    rows.append(list(bias))
  return np.array(rows)


def longcat(counts_E, tokens, k, ffn_per_token, num_zero, rate):
  """2509.01322: by how much each bias moves; those of the last `num_zero` experts do not."""
  num_ffn = len(counts_E) - num_zero
  moves = [0.0] * len(counts_E)
  for e in range(num_ffn if tokens else 0):
    moves[e] = rate * (ffn_per_token / (k * num_ffn) - counts_E[e] / (k * tokens))
  return np.array(moves)
