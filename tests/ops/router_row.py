"""What a row of the routers' laws table says, and the random arguments that rows name."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from tests.reference import routing as reference

T = 12  # tokens of a group in the laws


def uniform_per_token(key):
  return np.asarray(jax.random.uniform(key, (T,)))


def uniform_per_further_choice(key):
  return np.asarray(jax.random.uniform(key, (T, 2)))


def four_sequences(seed):
  """Which of four sequences each token belongs to; their lengths depend on the seed."""
  lengths = [3, 3, 3, 3] if seed % 2 == 0 else [1, 5, 2, 4]
  return {"sequence": np.repeat(np.arange(4, dtype=np.int32), lengths)}


def normals(*widths):
  """key -> standard normal noise [T, width]; for several widths a tuple, each from its own key."""

  def draw(key):
    keys = [key] if len(widths) == 1 else jax.random.split(key, len(widths))
    drawn = [np.asarray(jax.random.normal(k, (T, width))) for k, width in zip(keys, widths)]
    return drawn[0] if len(widths) == 1 else tuple(drawn)

  return draw


def further_logits(*widths):
  """seed -> an array [T, width] for each width."""

  def draw(seed):
    rng = np.random.default_rng(seed + 50)
    return tuple(rng.normal(size=(T, width)).astype(np.float32) for width in widths)

  return draw


def twenty_ids(seed):
  """Vocabulary ids in [0, 20), for tables with fewer rows too."""
  return {"token_id": np.random.default_rng(seed + 50).integers(0, 20, T).astype(np.int32)}


class Row(NamedTuple):
  """One router under test.

  `reference(logits_TE, k, bias_E, mask_T, draw, *more_logits, **context)` is a slow loop in float64 that gives a
  list of `reference.Entry`, in priority order. `bias_E` is an array of zeros where there is no bias, and `draw` is
  None where the router got no key.
  """

  spec: str
  num_experts: int
  k: int
  reference: Callable
  score: Callable = reference.softmax  # logits_E -> scores_E, a list of floats
  draw: Callable | None = None  # key -> the random numbers that the router draws from it, as numpy
  draws_per_expert: bool = False  # what is drawn belongs to experts: they cannot be permuted under a key
  leaks: str = ""  # as the router declares it
  leak_found: str | None = None  # what the laws find, where that is less: in evaluation
  more_logits: Callable[[int], tuple] = (
    lambda seed: ()
  )  # seed -> the results of the router's further projections
  context: Callable[[int], dict[str, Any]] = lambda seed: {}  # seed -> further fields of the `RouterContext`
  train: bool = False
  zero_computation: int = 0  # columns of the logits beyond the experts
  takes_bias: bool = True
  bias_decides: bool = True  # an overwhelming bias brings its expert to every token
  own_weights: bool = False  # a weight does not depend on which other experts the token has
  shift_matters: bool = False  # a bias that is the same for all experts changes the choice
  permutable: bool = True  # experts have no order or groups
  exact_ties: bool = True  # equal scores go to the lower index
  differentiable: bool = True  # weights depend on the logits
