"""The routers as slow loops over tokens and experts in numpy float64, with the published formulas.

Shares no code and no method with the package: experts are picked by scanning, weights are quotients.
"""

import math
from typing import NamedTuple

import numpy as np


class Entry(NamedTuple):
  """One line of an assignment."""

  token: int
  expert: int
  weight: float
  valid: bool
  holds_slot: bool


def softmax(logits_E):
  exps = [math.exp(x - max(logits_E)) for x in logits_E]
  return [x / sum(exps) for x in exps]


def sigmoid(logits_E):
  return [math.exp(x) / (1 + math.exp(x)) if x < 0 else 1 / (1 + math.exp(-x)) for x in logits_E]


def pick(scores_E, bias_E, k):
  """The k best experts, best first: k scans for the strictly largest of those that are left."""
  chosen = []
  for _ in range(k):
    best = None
    for e in range(len(scores_E)):
      if e not in chosen and (best is None or scores_E[e] + bias_E[e] > scores_E[best] + bias_E[best]):
        best = e
    chosen.append(best)
  return chosen


def token_choice(logits_TE, k, bias_E, mask_T, score, weigh):
  """Token after token, each its k experts. `weigh`: (scores of the chosen) -> their weights."""
  entries = []
  for t, logits_E in enumerate(np.asarray(logits_TE, np.float64)):
    scores_E = score(logits_E)
    chosen = pick(scores_E, bias_E, k)
    for e, weight in zip(chosen, weigh([scores_E[e] for e in chosen])):
      entries.append(Entry(t, e, weight, bool(mask_T[t]), bool(mask_T[t])))
  return entries


def _over_sum(scores):
  return [s / sum(scores) for s in scores]


def softmax_topk(logits_TE, k, bias_E, mask_T, draw_T=None):
  return token_choice(logits_TE, k, bias_E, mask_T, softmax, _over_sum)


def softmax_before_topk(logits_TE, k, bias_E, mask_T, draw_T=None):
  return token_choice(logits_TE, k, bias_E, mask_T, softmax, list)


def sigmoid_topk(logits_TE, k, bias_E, mask_T, draw_T=None):
  return token_choice(logits_TE, k, bias_E, mask_T, sigmoid, list)


def llama4_topk(logits_TE, k, bias_E, mask_T, draw_T=None):
  """The weights multiply what the experts read: see `moe_layer` for that."""
  return sigmoid_topk(logits_TE, k, bias_E, mask_T)


def deepseek_v3(logits_TE, k, bias_E, mask_T, draw_T=None):
  return token_choice(
    logits_TE, k, bias_E, mask_T, sigmoid, lambda scores: [2.5 * w for w in _over_sum(scores)]
  )


def gshard_top2(logits_TE, k, bias_E, mask_T, draw_T=None, threshold=0.5):
  """All first choices, then all second ones, each sent with probability min(1, g2 / threshold)."""
  firsts, seconds = [], []
  for t, logits_E in enumerate(np.asarray(logits_TE, np.float64)):
    scores_E = softmax(logits_E)
    e1, e2 = pick(scores_E, bias_E, k)
    g1, g2 = _over_sum([scores_E[e1], scores_E[e2]])
    real = bool(mask_T[t])
    sent = draw_T is None or g2 / threshold > draw_T[t]
    firsts.append(Entry(t, e1, g1, real, real))
    seconds.append(Entry(t, e2, g2, real and sent, real))
  return firsts + seconds


def gshard_algorithm_1(logits_SE, capacity, rnd_S):
  """2006.16668, Algorithm 1, line by line: combine weights {(s, e): g} and l_aux."""
  g_SE = [softmax(row) for row in np.asarray(logits_SE, np.float64)]
  S, E = len(g_SE), len(g_SE[0])
  combine, c, top2 = {}, [0] * E, []
  m = [sum(g_SE[s][e] for s in range(S)) / S for e in range(E)]
  for s in range(S):
    e1, e2 = pick(g_SE[s], [0] * E, 2)
    g1, g2 = g_SE[s][e1], g_SE[s][e2]
    top2.append((e1, e2, g1, g2))
    if c[e1] < capacity:
      combine[s, e1] = g1 / (g1 + g2)
    c[e1] += 1
  l_aux = sum(c[e] / S * m[e] for e in range(E)) / E
  for s in range(S):
    _, e2, g1, g2 = top2[s]
    g2 = g2 / (g1 + g2)
    if c[e2] < capacity and 2 * g2 > rnd_S[s]:
      combine[s, e2] = g2
    c[e2] += 1
  return combine, l_aux


def mesh_tensorflow_kept(logits_SE, capacity, rnd_S, threshold=0.5):
  """The kept (s, e) if slots are counted as Mesh-TensorFlow does, which is not Algorithm 1: second choices
  start after the first ones that were kept, and only those that are sent take a slot."""
  g_SE = [softmax(row) for row in np.asarray(logits_SE, np.float64)]
  kept, c = set(), [0] * len(g_SE[0])
  pairs = [pick(g_E, [0] * len(c), 2) for g_E in g_SE]
  for s, (e1, _) in enumerate(pairs):
    if c[e1] < capacity:
      kept.add((s, e1))
      c[e1] += 1
  for s, (e1, e2) in enumerate(pairs):
    if g_SE[s][e2] / (g_SE[s][e1] + g_SE[s][e2]) > threshold * rnd_S[s] and c[e2] < capacity:
      kept.add((s, e2))
      c[e2] += 1
  return kept


def assert_gradients(loss, values, gradients, at_least, directions=1):
  """Each gradient along random directions of its own equals the central difference of the float64 `loss(values)`.

  A variable is moved on its own, so that no error hides behind another. `at_least`: how large a slope must be found."""
  rng = np.random.default_rng(3)
  for name, gradient in gradients.items():
    found = []
    for _ in range(directions):
      direction = rng.normal(size=np.shape(gradient))
      above, below = (loss(values | {name: values[name] + s * 1e-6 * direction}) for s in (1, -1))
      found.append((above - below) / 2e-6)
      np.testing.assert_allclose(np.sum(gradient * direction), found[-1], rtol=1e-3, atol=1e-4, err_msg=name)
    assert np.abs(found).max() > at_least, name


def finite_differences(function, x, eps=1e-5):
  """The gradient of a scalar function of a float64 array, by central differences."""
  x = np.array(x, np.float64)
  gradient = np.zeros_like(x)
  for index in np.ndindex(*x.shape):
    centre = x[index]
    x[index] = centre + eps
    above = function(x)
    x[index] = centre - eps
    gradient[index] = (above - function(x)) / (2 * eps)
    x[index] = centre
  return gradient
