"""Routers that limit which experts a token may use, as slow loops in float64 written from the papers."""

import math

import numpy as np

from tests.reference.routing import Entry, pick, sigmoid, softmax


def sqrt_softplus(logits_E):
  """sqrt(log(1 + e^x)); e^x is factored out for large x."""
  return [math.sqrt(x + math.log1p(math.exp(-x)) if x > 0 else math.log1p(math.exp(x))) for x in logits_E]


SCORES = {"softmax": softmax, "sigmoid": sigmoid, "sqrt_softplus": sqrt_softplus}


def weights_of(scores, normalize, scale):
  total = sum(scores) if normalize else 1
  return [scale * s / total for s in scores]


def best_of(candidates, value, k):
  """The k candidates of the highest value, best first; the earlier one of equals."""
  left, chosen = list(candidates), []
  for _ in range(k):
    best = left[0]
    for e in left:
      if value[e] > value[best]:
        best = e
    left.remove(best)
    chosen.append(best)
  return chosen


def sqrt_softplus_topk(logits_TE, k, bias_E, mask_T, draw_T=None, normalize=True, scale=1.0):
  entries = []
  for t, logits_E in enumerate(np.asarray(logits_TE, np.float64)):
    scores_E = sqrt_softplus(logits_E)
    chosen = pick(scores_E, bias_E, k)
    weights = weights_of([scores_E[e] for e in chosen], normalize, scale)
    entries += [Entry(t, e, w, bool(mask_T[t]), bool(mask_T[t])) for e, w in zip(chosen, weights)]
  return entries


def groups_chosen(biased_E, groups, groups_per_token, group_top):
  """The experts of the best groups, by the sum of each group's best scores."""
  size = len(biased_E) // groups
  members = [list(range(g * size, (g + 1) * size)) for g in range(groups)]
  score = [sum(sorted((biased_E[e] for e in group), reverse=True)[:group_top]) for group in members]
  return [e for g in best_of(range(groups), score, groups_per_token) for e in members[g]]


def group_limited(
  logits_TE,
  k,
  bias_E,
  mask_T,
  draw_T=None,
  *,
  groups,
  groups_per_token,
  group_top,
  score,
  normalize=False,
  scale=1.0,
  masked=-math.inf,
):
  """`masked`: what experts of the other groups count as; 0.0 is the error of other codebases."""
  entries = []
  for t, logits_E in enumerate(np.asarray(logits_TE, np.float64)):
    scores_E = SCORES[score](logits_E)
    biased_E = [s + b for s, b in zip(scores_E, bias_E)]
    allowed = groups_chosen(biased_E, groups, groups_per_token, group_top)
    seen_E = [b if e in allowed else masked for e, b in enumerate(biased_E)]
    chosen = best_of(range(len(seen_E)), seen_E, k)
    weights = weights_of([scores_E[e] for e in chosen], normalize, scale)
    entries += [Entry(t, e, w, bool(mask_T[t]), bool(mask_T[t])) for e, w in zip(chosen, weights)]
  return entries


def grouped_topk(logits_TE, k, bias_E, mask_T, draw_T=None, *, groups, normalize=False):
  """Group after group, its k / groups best experts of the softmax over all."""
  entries, size = [], len(bias_E) // groups
  for t, logits_E in enumerate(np.asarray(logits_TE, np.float64)):
    scores_E = softmax(logits_E)
    biased_E = [s + b for s, b in zip(scores_E, bias_E)]
    members = [range(g * size, (g + 1) * size) for g in range(groups)]
    chosen = [e for group in members for e in best_of(group, biased_E, k // groups)]
    weights = weights_of([scores_E[e] for e in chosen], normalize, 1.0)
    entries += [Entry(t, e, w, bool(mask_T[t]), bool(mask_T[t])) for e, w in zip(chosen, weights)]
  return entries


def topology_aware(logits_TE, k, bias_E, mask_T, draw_T=None, *, nodes, fraction):
  """Node after node: who would leave, in the order of the best remote logit; the others stay at home."""
  logits_TE = np.asarray(logits_TE, np.float64)
  tokens, experts = logits_TE.shape
  scores = [softmax(x) for x in logits_TE]
  biased = [[s + b for s, b in zip(scores_E, bias_E)] for scores_E in scores]
  chosen = {}
  for node in range(nodes):
    here = [t for t in range(tokens) if t * nodes // tokens == node]
    home = [e for e in range(experts) if e * nodes // experts == node]
    leaving = []
    for t in here:
      wanted = best_of(range(experts), biased[t], k)
      remote = [logits_TE[t][e] for e in wanted if e not in home]
      chosen[t] = wanted
      if remote:
        chosen[t] = best_of(home, biased[t], k)
        if mask_T[t]:
          leaving.append((-max(remote), t, wanted))
    for _, t, wanted in sorted(leaving)[: math.floor(fraction * len(here))]:
      chosen[t] = wanted
  entries = []
  for t in range(tokens):
    weights = weights_of([scores[t][e] for e in chosen[t]], True, 1.0)
    entries += [Entry(t, e, w, bool(mask_T[t]), bool(mask_T[t])) for e, w in zip(chosen[t], weights)]
  return entries
