"""From sums to the numbers of a result: per-layer statistics, parameter counts, versions, tail means."""

import math
import platform
from typing import Any

import flax
import jax
import numpy as np
from flax import nnx

from moe_jax import __version__
from moe_jax.config import Config
from moe_jax.nn.aux import by_layer
from moe_jax.nn.moe import MoE
from moe_jax.nn.transformer import Transformer
from moe_jax.ops.metrics import METRICS
from moe_jax.training.step import EvalSums


def validation_summary(sums: EvalSums, num_bytes: float | None = None) -> dict[str, Any]:
  """What the sums over an evaluation say, per layer, as plain lists over the R layers with experts.

  Args:
    sums: over all batches.
    num_bytes: the utf-8 bytes of the targets; None: there are no bits per byte.
  """
  read = lambda name, block: METRICS[name].read(jax.tree.map(np.asarray, block[name]))
  found = [blocks for blocks in sums.metrics if blocks]
  nll = float(sums.nll / sums.num_targets)
  return {
    "nll": nll,
    "perplexity": math.exp(min(nll, 700.0)),
    **({"bits_per_byte": float(sums.nll) / (math.log(2) * num_bytes)} if num_bytes else {}),
    "num_tokens": int(sums.num_tokens),
    "num_targets": int(sums.num_targets),
    **{
      name: np.asarray(by_layer([[read(name, b) for b in blocks] for blocks in found])).tolist()
      for name, metric in METRICS.items()
      if found and metric.validation is not None
    },
  }


def table_columns() -> list[dict[str, Any]]:
  """What tables must know of each metric that has a column; stored with the results, so that they need no code."""
  columns = []
  for name, metric in METRICS.items():
    for part, title in (("validation", metric.validation), ("training", metric.training)):
      if title:
        key = name if part == "validation" else f"{name}_training"
        shared = {"unit": metric.unit, "format": metric.format, "lower_is_better": metric.lower_is_better}
        columns.append({"key": key, "title": title, "part": part, "name": name, **shared})
  return columns


def count_params(model: Transformer) -> tuple[int, int]:
  """(all parameters, those that one token uses: K of E routed experts), embeddings included in both.

  Args:
    model: may be abstract.
  """
  total = sum(w.size for w in jax.tree.leaves(nnx.state(model, nnx.Param)))
  unused = 0
  for _, layer in nnx.iter_modules(model):
    if isinstance(layer, MoE):
      routed = sum(w.size for w in jax.tree.leaves(nnx.state(layer.experts, nnx.Param)))
      unused += routed - routed * layer.num_experts_per_token // layer.num_experts
  return total, total - unused


def versions() -> dict[str, str]:
  """Of what a result depends on."""
  return {
    "moe_jax": __version__,
    "jax": jax.__version__,
    "flax": flax.__version__,
    "numpy": np.__version__,
    "python": platform.python_version(),
  }


class TailMeans:
  """Means over the last part of training of what single steps measure noisily."""

  def __init__(self, config: Config):
    steps = math.ceil(config.train.num_steps * config.train.tail_fraction)
    self.names = ["loss", *(name for name, metric in METRICS.items() if metric.training)]
    self.first = config.train.num_steps - steps + 1
    self.count = 0
    self.sums: dict[str, Any] = {}

  def add(self, step: int, metrics: dict[str, np.ndarray]) -> None:
    if step >= self.first:
      self.count += 1
      for name in self.names:
        if name in metrics:
          self.sums[name] = self.sums.get(name, 0) + np.asarray(metrics[name], np.float64)

  def means(self) -> dict[str, Any]:
    return {name: (total / self.count).tolist() for name, total in self.sums.items()}

  def to_json(self) -> dict[str, Any]:
    return {"count": self.count, "sums": {name: total.tolist() for name, total in self.sums.items()}}

  def from_json(self, saved: dict[str, Any]) -> None:
    self.count = saved["count"]
    self.sums = {name: np.asarray(total) for name, total in saved["sums"].items()}
