"""Smaller models of one model by name of a method, from statistics that are computed once."""

import numpy as np

from moe_jax.adapt.calibrate import calibrate, losses
from moe_jax.adapt.experts import merge, prune
from moe_jax.data import Batch
from moe_jax.errors import unknown_name
from moe_jax.nn.transformer import Transformer

MERGES = {
  "merge_average": {"weights": "equal"},
  "merge_usage": {},
  "merge_unaligned": {"align": False},
  "merge_router": {"router": "averaged"},
}
METHODS = ("random", "usage", "probability", "output_norm", "loss", *MERGES)


class Compressor:
  """Makes models with fewer experts: `Compressor(model, batches)("merge_usage", 4)`.

  Statistics are computed when they are first needed.

  Args:
    model: has experts. It is not changed.
    batches: of a calibration text. Text of one domain makes the experts stay that this domain uses (2110.03742).
  """

  def __init__(self, model: Transformer, batches: list[Batch]):
    self.model, self.batches, self._kept = model, batches, {}

  def __call__(self, method: str, num_experts: int) -> Transformer:
    """Returns the model with `num_experts` experts a layer.

    - random: pruned, whatever they do;
    - usage: the most used experts stay;
    - probability: those with the highest mean probability of the router;
    - output_norm: those whose output, weighted by the router, is largest (REAP, 2510.13999);
    - loss: those whose loss costs most;
    - merge_average, merge_usage: `merge` with equal weights, or by usage;
    - merge_unaligned: merge_usage without the Hungarian match;
    - merge_router: merge_usage with the columns of the router merged, too.

    Raises:
      InputError: if there is no such method, or not as many experts.
    """
    if method not in METHODS:
      raise unknown_name("method", method, METHODS)
    if method in MERGES:
      return merge(self.model, self._statistics(calibrate), num_experts, **MERGES[method])
    return prune(self.model, self.scores(method), num_experts)

  def scores(self, method: str) -> dict[int, np.ndarray]:
    """Returns what each expert is worth to a method that prunes, [E] by layer."""
    if method == "loss":
      return self._statistics(losses)
    found = self._statistics(calibrate)
    if method == "random":
      return {i: np.random.default_rng(i).permutation(len(x.tokens_E)) for i, x in found.items()}
    field = {"usage": "tokens_E", "probability": "probability_E", "output_norm": "output_norm_E"}[method]
    return {i: getattr(calibration, field) for i, calibration in found.items()}

  def _statistics(self, function) -> dict:
    if function not in self._kept:
      self._kept[function] = function(self.model, self.batches)
    return self._kept[function]
