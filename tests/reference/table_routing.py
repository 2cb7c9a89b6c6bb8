"""Routers by a fixed table, as slow loops written from the papers."""

import numpy as np

from tests.reference.limited_routing import SCORES, weights_of
from tests.reference.routing import Entry


def uniform(logits_E):
  return [1 / len(logits_E) for _ in logits_E]


def random_table(vocab_size, num_experts, k, seed):
  """Row after row, each expert is taken out of a list of those that are left.

  The numbers are drawn column after column from RandomState(seed), which is what fixes the table.
  """
  random = np.random.RandomState(seed)
  places = [random.randint(0, num_experts - i, size=vocab_size) for i in range(k)]
  table = []
  for v in range(vocab_size):
    left = list(range(num_experts))
    table.append([left.pop(places[i][v]) for i in range(k)])
  return table


def by_table(logits_TE, k, bias_E, mask_T, draw_T=None, *, token_id, table, score, normalize=True, scale=1.0):
  """Token after token, the experts that the table has for its id."""
  entries = []
  for t, logits_E in enumerate(np.asarray(logits_TE, np.float64)):
    experts = table[int(token_id[t]) % len(table)]
    scores_E = score(logits_E)
    weights = weights_of([scores_E[e] for e in experts], normalize, scale)
    entries += [Entry(t, e, w, bool(mask_T[t]), bool(mask_T[t])) for e, w in zip(experts, weights)]
  return entries


def hash_topk(logits_TE, k, bias_E, mask_T, draw_T=None, *, token_id, seed, vocab_size):
  table = random_table(vocab_size, len(logits_TE[0]), k, seed)
  return by_table(
    logits_TE, k, bias_E, mask_T, draw_T, token_id=token_id, table=table, score=uniform, normalize=True
  )


def frozen_table_topk(
  logits_TE, k, bias_E, mask_T, draw_T=None, *, token_id, seed, vocab_size, score, normalize, scale
):
  table = random_table(vocab_size, len(logits_TE[0]), k, seed)
  return by_table(
    logits_TE,
    k,
    bias_E,
    mask_T,
    draw_T,
    token_id=token_id,
    table=table,
    score=SCORES[score],
    normalize=normalize,
    scale=scale,
  )
