"""From sums to the numbers of a result: per-layer statistics, parameter counts, versions, tail means."""

import math
import platform
from typing import Any

import flax
import jax
import numpy as np

from moe_jax import __version__
from moe_jax.config import Config
from moe_jax.ops import stats
from moe_jax.training.step import EvalSums, TrainState


def validation_summary(sums: EvalSums) -> dict[str, Any]:
  """Ratios from the sums over an evaluation, as plain lists over the R layers with experts."""
  by_expert_RE = sums.tokens_per_expert_RSE.sum(axis=1)
  per_layer = {
    "max_vio_global": stats.max_vio(by_expert_RE),
    "dropped_fraction": stats.dropped_fraction(by_expert_RE, sums.kept_per_expert_RE),
    "dead_experts": stats.dead_experts(by_expert_RE),
    "load_entropy": stats.load_entropy(by_expert_RE),
    "router_entropy": sums.router_entropy_R / sums.num_tokens,
    "mutual_information": stats.mutual_information(sums.tokens_per_expert_RSE),
    "load": stats.load(by_expert_RE),
    "load_by_domain": stats.load(sums.tokens_per_expert_RSE),
  }
  nll = float(sums.nll / sums.num_tokens)
  return {
    "nll": nll,
    "perplexity": math.exp(nll),
    "num_tokens": int(sums.num_tokens),
    **{name: np.asarray(value).tolist() for name, value in per_layer.items()},
  }


def count_params(config: Config, state: TrainState) -> tuple[int, int]:
  """(all parameters, those that one token uses: K of E routed experts), embeddings included in both."""
  sizes = {"/".join(map(str, path)): leaf.size for path, leaf in flax.nnx.to_flat_state(state.params)}
  total = sum(sizes.values())
  routed = sum(size for path, size in sizes.items() if path.endswith(("_EDF", "_EFD")))
  moe = config.model.moe
  return total, total - routed + routed * moe.num_experts_per_token // moe.num_experts


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

  NAMES = ("loss", "max_vio", "dropped_fraction")

  def __init__(self, config: Config):
    steps = math.ceil(config.train.num_steps * config.train.tail_fraction)
    self.first = config.train.num_steps - steps + 1
    self.count = 0
    self.sums: dict[str, Any] = {}

  def add(self, step: int, metrics: dict[str, np.ndarray]) -> None:
    if step >= self.first:
      self.count += 1
      for name in self.NAMES:
        self.sums[name] = self.sums.get(name, 0) + np.asarray(metrics[name], np.float64)

  def means(self) -> dict[str, Any]:
    return {name: (total / self.count).tolist() for name, total in self.sums.items()}

  def to_json(self) -> dict[str, Any]:
    return {"count": self.count, "sums": {name: total.tolist() for name, total in self.sums.items()}}

  def from_json(self, saved: dict[str, Any]) -> None:
    self.count = saved["count"]
    self.sums = {name: np.asarray(total) for name, total in saved["sums"].items()}
