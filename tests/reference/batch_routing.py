"""Routers that choose for a whole group at once, as slow loops in numpy float64 from the papers' formulas."""

import math

import numpy as np
from scipy.optimize import linear_sum_assignment

from tests.reference.routing import Entry, pick, sigmoid, softmax


def _scores(logits_TE, score):
  return [score(logits_E) for logits_E in np.asarray(logits_TE, np.float64)]


def _first_largest(values, among):
  """The index of the largest value among some indices, the lowest one of several."""
  best = None
  for i in among:
    if best is None or values[i] > values[best]:
      best = i
  return best


def _by_falling(values, among):
  """The indices `among` by falling value, by repeated scans."""
  left, order = list(among), []
  while left:
    order.append(_first_largest(values, left))
    left.remove(order[-1])
  return order


def batch_prioritized(logits_TE, k, bias_E, mask_T, draw=None, priority="max"):
  """First choices of all tokens by falling importance, then second ones, ...; padding behind all others."""
  scores_TE = _scores(logits_TE, softmax)
  chosen = [pick(scores_E, bias_E, k) for scores_E in scores_TE]
  weights = [[s[e] for e in experts] for s, experts in zip(scores_TE, chosen)]
  importance = [max(w) if priority == "max" else sum(w) for w in weights]
  real = [t for t in range(len(chosen)) if mask_T[t]]
  order = _by_falling(importance, real) + [t for t in range(len(chosen)) if not mask_T[t]]
  return [
    Entry(t, chosen[t][i], weights[t][i], bool(mask_T[t]), bool(mask_T[t])) for i in range(k) for t in order
  ]


def expert_choice(logits_TE, k, bias_E, mask_T, draw=None):
  """2202.09368, eq. 1-2, expert after expert. The list is as long as it would be without padding."""
  scores_TE = _scores(logits_TE, softmax)
  tokens, experts = len(scores_TE), len(scores_TE[0])
  real = [t for t in range(tokens) if mask_T[t]]
  padding = [t for t in range(tokens) if not mask_T[t]]
  taken, listed = math.ceil(len(real) * k / experts), math.ceil(tokens * k / experts)
  entries = []
  for e in range(experts):
    column = [scores_TE[t][e] for t in range(tokens)]
    for rank, t in enumerate((_by_falling(column, real) + padding)[:listed]):
      entries.append(Entry(t, e, column[t], rank < taken, rank < taken))
  return entries


def token_rounding(logits_TE, k, bias_E, mask_T, draw=None, *, tile, to="nearest"):
  """Expert after expert: its tokens by weight, then the others by score, of which it takes a rounded number."""
  scores_TE = _scores(logits_TE, softmax)
  tokens, experts = len(scores_TE), len(scores_TE[0])
  real, padding = ([t for t in range(tokens) if bool(mask_T[t]) == is_real] for is_real in (True, False))
  chosen = [pick(scores_E, bias_E, k) for scores_E in scores_TE]
  weights = [{e: s[e] / sum(s[i] for i in own) for e in own} for s, own in zip(scores_TE, chosen)]
  most_added = {"nearest": tile // 2, "up": tile - 1, "down": 0}[to]
  taken, added = [], []
  for e in range(experts):
    of_expert = [t for t in real if e in chosen[t]]
    order = _by_falling({t: weights[t][e] for t in of_expert}, of_expert)
    others = [t for t in real if e not in chosen[t]]
    order += _by_falling({t: scores_TE[t][e] for t in others}, others) + padding
    count = len(of_expert)
    below, above = count - count % tile, count + -count % tile
    nearer = (
      above
      if above - count < count - below or (above - count == count - below and below // tile % 2)
      else below
    )
    rounded = {"nearest": nearer, "up": above, "down": below}[to]
    rounded = rounded if rounded <= len(real) else below
    taken.append(order[:rounded])
    for place in range(count, count + min(most_added, tokens)):
      t, valid = order[min(place, tokens - 1)], place < rounded
      added.append(Entry(t, e, scores_TE[t][e], valid, valid))
  kept = lambda t, e: bool(mask_T[t]) and t in taken[e]
  own = [Entry(t, e, weights[t][e], kept(t, e), kept(t, e)) for t in range(tokens) for e in chosen[t]]
  return own + added


def best_balanced(scores_TE):
  """Every token's expert in the best assignment with floor(n/E) to ceil(n/E) tokens per expert, by scipy.

  An expert is floor(n/E) places that must be filled, which a bonus ensures, and perhaps one more.
  """
  scores_TE = np.asarray(scores_TE, np.float64)
  n, experts = scores_TE.shape
  places = [(e, True) for e in range(experts) for _ in range(n // experts)]
  places += [(e, False) for e in range(experts) if n % experts]
  bonus = 10 * n * (1 + np.abs(scores_TE).max(initial=0))
  value_TP = np.array([[scores_TE[t, e] + bonus * must for e, must in places] for t in range(n)])
  _, place_T = linear_sum_assignment(value_TP.reshape(n, len(places)), maximize=True)
  return [places[p][0] for p in place_T]


def base_assignment(logits_TE, k, bias_E, mask_T, draw=None, train=True):
  logits_TE, expert_T = np.asarray(logits_TE, np.float64), [0] * len(logits_TE)
  real = [t for t in range(len(logits_TE)) if mask_T[t]]
  if train:
    for t, e in zip(real, best_balanced(logits_TE[real])):
      expert_T[t] = e
  else:
    expert_T = [_first_largest(logits_E, range(len(logits_E))) for logits_E in logits_TE]
  weights = [sigmoid(logits_E)[e] for logits_E, e in zip(logits_TE, expert_T)]
  return [Entry(t, e, w, bool(mask_T[t]), bool(mask_T[t])) for t, (e, w) in enumerate(zip(expert_T, weights))]


def sinkhorn_plan(logits_TE, sweeps=2000):
  """The plan with row sums 1/n and column sums 1/E, as in Megatron-LM: exponentials scaled in turn."""
  cost_TE = [[math.exp(x) for x in logits_E] for logits_E in np.asarray(logits_TE, np.float64)]
  n, experts = len(cost_TE), len(cost_TE[0])
  d0, d1 = [1.0] * n, [1.0] * experts
  for _ in range(sweeps):
    before = list(d1)
    d0 = [1 / n / sum(d1[e] * cost_TE[t][e] for e in range(experts)) for t in range(n)]
    d1 = [1 / experts / sum(d0[t] * cost_TE[t][e] for t in range(n)) for e in range(experts)]
    if max(abs(b / a - 1) for a, b in zip(before, d1)) < 1e-12:
      break
  return [[d0[t] * cost_TE[t][e] * d1[e] for e in range(experts)] for t in range(n)]


def sinkhorn(logits_TE, k, bias_E, mask_T, draw=None, train=True, score=softmax):
  scores_TE, real = _scores(logits_TE, score), [t for t in range(len(logits_TE)) if mask_T[t]]
  values = {t: scores_TE[t] for t in range(len(scores_TE))}
  if train and real:
    values |= dict(zip(real, sinkhorn_plan([logits_TE[t] for t in real])))
  no_bias = [0] * len(scores_TE[0])
  entries = []
  for t, scores_E in enumerate(scores_TE):
    for e in pick(values[t], no_bias, k):
      entries.append(Entry(t, e, scores_E[e], bool(mask_T[t]), bool(mask_T[t])))
  return entries


def sinkhorn_sigmoid(logits_TE, k, bias_E, mask_T, draw=None, train=True):
  return sinkhorn(logits_TE, k, bias_E, mask_T, draw, train, score=sigmoid)


def _between(values, i):
  """Half-way between the i-th and the next largest, counted from 1; the i-th if it is the last."""
  ordered = sorted(values, reverse=True)
  return (ordered[i - 1] + ordered[min(i, len(ordered) - 1)]) / 2


def quantile_beta(scores_TE, k, rounds=5):
  """kexue.fm/archives/11619: alternating minimisation of the dual, over the tokens given."""
  n, experts = len(scores_TE), len(scores_TE[0])
  share = max(1, math.floor(n * k / experts + 0.5))
  beta = [0.0] * experts
  for _ in range(rounds):
    alpha = [_between([s - b for s, b in zip(scores_E, beta)], k) for scores_E in scores_TE]
    beta = [_between([scores_TE[t][e] - alpha[t] for t in range(n)], share) for e in range(experts)]
  return beta


def quantile_topk(logits_TE, k, bias_E, mask_T, draw=None, score=sigmoid, rounds=5, strength=1.0):
  scores_TE = _scores(logits_TE, score)
  real = [scores_E for scores_E, is_real in zip(scores_TE, mask_T) if is_real]
  beta = quantile_beta(real, k, rounds) if real else [0.0] * len(scores_TE[0])
  entries = []
  for t, scores_E in enumerate(scores_TE):
    for e in pick(scores_E, [-strength * b for b in beta], k):
      entries.append(Entry(t, e, scores_E[e], bool(mask_T[t]), bool(mask_T[t])))
  return entries


def quantile_topk_softmax(logits_TE, k, bias_E, mask_T, draw=None):
  return quantile_topk(logits_TE, k, bias_E, mask_T, score=softmax, rounds=3, strength=0.5)
