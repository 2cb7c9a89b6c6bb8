"""The laws table of routers: one row per method and option that changes what it computes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from tests.reference import routing as reference

T = 12  # tokens of a group in the laws


def uniform_per_token(key):
  return np.asarray(jax.random.uniform(key, (T,)))


class Row(NamedTuple):
  """One router under test.

  `reference(logits_TE, k, bias_E, mask_T, draw, **further)` is a slow loop in float64 that gives a list of
  `reference.Entry`, in priority order. `bias_E` is an array of zeros where there is no bias, and `draw` is None
  where the router got no key.
  """

  spec: str
  num_experts: int
  k: int
  reference: Callable
  score: Callable = reference.softmax  # logits_E -> scores_E, a list of floats
  draw: Callable | None = None  # key -> the random numbers that the router draws from it, as numpy
  draws_per_expert: bool = (
    False  # what is drawn belongs to experts, so experts cannot be permuted under a key
  )
  leaks: str = ""  # as the router declares it
  further: Callable[[int], dict[str, Any]] = lambda seed: {}  # seed -> the router's further arguments
  takes_bias: bool = True
  bias_decides: bool = True  # an overwhelming bias brings its expert to every token
  own_weights: bool = False  # a weight does not depend on which other experts the token has
  permutable: bool = True  # experts have no order or groups
  exact_ties: bool = True  # equal scores go to the lower index
  differentiable: bool = True  # weights depend on the logits


ROWS = {
  "softmax_topk": Row("softmax_topk", 6, 2, reference.softmax_topk),
  "softmax_before": Row("softmax_topk:softmax=before", 6, 3, reference.softmax_before_topk, own_weights=True),
  "every_expert": Row("softmax_topk:before", 3, 3, reference.softmax_before_topk, own_weights=True),
  "sigmoid_topk": Row("sigmoid_topk", 6, 2, reference.sigmoid_topk, reference.sigmoid, own_weights=True),
  "deepseek_v3": Row("sigmoid_topk:normalize=true:scale=2.5", 6, 2, reference.deepseek_v3, reference.sigmoid),
  "switch_top1": Row("switch_top1", 6, 1, reference.softmax_before_topk, own_weights=True),
  "gshard_top2": Row("gshard_top2", 6, 2, reference.gshard_top2, draw=uniform_per_token, leaks="drops"),
  "gshard_mesh": Row(
    "gshard_top2:threshold=0.2", 6, 2, reference.gshard_top2_mesh, draw=uniform_per_token, leaks="drops"
  ),
}
