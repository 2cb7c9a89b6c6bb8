"""From sums to the numbers of a result: per-layer statistics, parameter counts, versions, tail means."""

import base64
import functools
import math
import platform
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import flax
import jax
import numpy as np
from flax import nnx

from moe_jax import __version__, disk
from moe_jax.config import Config
from moe_jax.config.plain import fingerprint, own_code, to_plain
from moe_jax.fingerprint import of_package
from moe_jax.nn.aux import by_layer
from moe_jax.nn.moe import MoE
from moe_jax.nn.transformer import Transformer
from moe_jax.ops.metrics import METRICS, Metric
from moe_jax.training.changes import FREE, lasting
from moe_jax.training.compiled import objective_of
from moe_jax.training.identity import start_folder
from moe_jax.training.own_metrics import own_metrics
from moe_jax.training.protocol import protocol_of, slots_of_mesh
from moe_jax.training.step import EvalSums
from moe_jax.types import Array, PyTree

if TYPE_CHECKING:
  from moe_jax.training.loop import Run


def validation_summary(sums: EvalSums, num_bytes: float | None = None) -> dict[str, Any]:
  """What the sums over an evaluation say, per layer, as plain lists over the R layers with experts.

  Args:
    sums: over all batches.
    num_bytes: the utf-8 bytes of the targets; None: there are no bits per byte.
  """
  found = jax.tree.map(np.asarray, [blocks for blocks in sums.metrics if blocks])
  stored = tuple((name, metric) for name, metric in METRICS.items() if metric.validation is not None)
  nll = float(sums.nll / sums.num_targets)
  return {
    "nll": nll,
    "perplexity": math.exp(min(nll, 700.0)),
    **({"bits_per_byte": float(sums.nll) / (math.log(2) * num_bytes)} if num_bytes else {}),
    "num_tokens": int(sums.num_tokens),
    "num_targets": int(sums.num_targets),
    **({name: np.asarray(x).tolist() for name, x in _read(stored, found).items()} if found else {}),
  }


@functools.partial(jax.jit, static_argnames="metrics")
def _read(metrics: tuple[tuple[str, Metric], ...], found: list[list[PyTree]]) -> dict[str, Array]:
  """What the sums of each block say, by layer: one program in place of dozens of single operations."""
  return {
    name: by_layer([[metric.read(block[name]) for block in blocks] for blocks in found])
    for name, metric in metrics
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

  Of a router that decides how many experts a token gets, it is the most that it may choose.

  Args:
    model: may be abstract.
  """
  total = sum(w.size for w in jax.tree.leaves(nnx.state(model, nnx.Param)))
  unused = 0
  for _, layer in nnx.iter_modules(model):
    if isinstance(layer, MoE):
      routed = sum(w.size for w in jax.tree.leaves(nnx.state(layer.experts, nnx.Param)))
      most = layer.router.most or layer.num_experts_per_token
      unused += routed - routed * most // layer.num_experts
  return total, total - unused


def versions() -> dict[str, str]:
  """Of what a result depends on."""
  return {
    "moe_jax": __version__,
    "code": of_package(),  # of moe_jax
    "jax": jax.__version__,
    "flax": flax.__version__,
    "numpy": np.__version__,
    "python": platform.python_version(),
  }


# What a limit says that the validation set does not reach, or none.
_WHOLE = {"eval_batches": 0, "eval_sequences": 0}


def result_of(run: "Run", validation: dict[str, Any], num_steps: int) -> dict[str, Any]:
  """Returns the result of a run that has `num_steps` steps and these validation numbers."""
  info, config = run.dataset.info, run.config
  num_params, num_active = count_params(run.steps.model)
  return {
    "arm": run.label,
    "seed": config.train.seed,
    **protocol_of(config),
    **(_WHOLE if run.evaluated_all else {}),
    "config": lasting(config),
    "metric_lines": run.metrics.lines if run.metrics else 0,
    "num_steps": num_steps,
    **({"init_from": init_from(run)} if config.train.init_from else {}),
    **({"own_code": code} if (code := own_code(config)) else {}),
    **({"own_metrics": digests} if (digests := own_metrics()) else {}),
    **({"teacher": teacher} if (teacher := objective_of(config).digest) else {}),
    "num_params": num_params,
    "num_active_params": num_active,
    "dataset": info.name,
    "fingerprint": info.fingerprint,
    "domains": list(info.domains),
    # Of next tokens, so no floor of a model that sees both sides.
    "entropy_rate": info.entropy_rate if config.model.causal else None,
    "validation_floor": info.validation_floor if config.model.causal else None,
    "bytes_per_token": info.bytes_per_token,
    "padded_fraction": info.padded_fraction.get("train"),  # of the tokens that steps count
    **({"yardsticks": info.yardsticks} if info.yardsticks and config.model.causal else {}),
    "columns": table_columns(),
    "validation": validation,
    "training": {
      **run.tail.means(),
      "tail_steps": run.tail.count,
      # The first step of a process has the time of the compiler in it, so a run of one step has no speed.
      "tokens_per_second": run.timed_steps * run.tokens_per_step / run.seconds if run.timed_steps else None,
      "seconds": run.seconds,
      "compile_seconds": run.compile_seconds,
    },
    "versions": versions(),
    "device": f"{jax.devices()[0].device_kind} x {jax.device_count()}",
  }


def init_from(run: "Run") -> dict[str, str]:
  """Returns what a run started from: the folder, and a digest of its parameters, by which results can be checked."""
  return {"folder": start_folder(run.config), "digest": run.start_digest}


def diverged_result(run: "Run", reason: str) -> dict[str, Any]:
  """Returns the result of a run whose numbers are no longer finite. Its table cells are infinite."""
  return {
    "arm": run.label,
    "seed": run.config.train.seed,
    "fingerprint": run.dataset.info.fingerprint,
    "config": lasting(run.config),
    "diverged": reason,
    "validation": {"nll": "Infinity", "perplexity": "Infinity", "bits_per_byte": "Infinity"},
  }


def evaluation_digest(config: Config) -> str:
  """Returns 16 hexadecimal digits that are another for an evaluation under another configuration.

  Args:
    config: resolved. Fields that may change when a run continues do not count, and the mesh only where it decides
      which tokens share slots.
  """
  plain = to_plain(config, fingerprint)
  parts = {
    part: {name: value for name, value in values.items() if name not in FREE.get(part, ())}
    for part, values in plain.items()
  }
  return disk.digest_of_json(parts | {"slots": slots_of_mesh(config)})


class TailMeans:
  """Means over the last part of training of what single steps measure noisily.

  A run with a constant schedule may be extended, and the tail of the longer run begins later. Such a run keeps the numbers
  of each step of its tail.
  """

  def __init__(self, config: Config):
    steps = math.ceil(config.train.num_steps * config.train.tail_fraction)
    self.names = ["loss", *(name for name, metric in METRICS.items() if metric.training)]
    self.first = config.train.num_steps - steps + 1
    self.count = 0
    self.sums: dict[str, Any] = {}
    self._extensible = config.optimizer.schedule == "constant"
    self._values: dict[str, list[np.ndarray]] = {}  # of each step from `first` on

  def add(self, step: int, metrics: dict[str, np.ndarray]) -> None:
    if step >= self.first:
      self.count += 1
      for name in self.names:
        if name in metrics:
          self.sums[name] = self.sums.get(name, 0) + np.asarray(metrics[name], np.float64)
          if self._extensible:
            self._values.setdefault(name, []).append(np.asarray(metrics[name]))

  def means(self) -> dict[str, Any]:
    return {name: (total / self.count).tolist() for name, total in self.sums.items()}

  def to_json(self) -> dict[str, Any]:
    sums = {name: total.tolist() for name, total in self.sums.items()}
    values = {name: _to_text(np.stack(steps)) for name, steps in self._values.items()}
    return {"first": self.first, "count": self.count, "sums": sums, "values": values}

  def from_json(self, saved: dict[str, Any]) -> None:
    """Goes on with what was saved, maybe of a shorter run, whose tail began earlier.

    A metric that was registered in a part of the tail only has no mean.
    """
    values = {name: _from_text(text) for name, text in saved.get("values", {}).items()}
    if values:
      for i in range(max(self.first - saved["first"], 0), saved["count"]):
        self.add(saved["first"] + i, {name: steps[i] for name, steps in values.items()})
    elif saved["first"] == self.first:
      self.count = saved["count"]
      self.sums = {name: np.asarray(total) for name, total in saved["sums"].items()}
    if self.count:
      self.names = [name for name in self.names if name in self.sums]
      self.sums = {name: self.sums[name] for name in self.names}


def _to_text(array: np.ndarray) -> list:
  """Returns [type, shape, bytes in base64], the numbers of many steps as a short JSON value."""
  return [
    array.dtype.str,
    list(array.shape),
    base64.b64encode(np.ascontiguousarray(array).tobytes()).decode(),
  ]


def _from_text(saved: list) -> np.ndarray:
  dtype, shape, text = saved
  return np.frombuffer(base64.b64decode(text), dtype).reshape(shape)


def scalars(validation: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the numbers and the numbers per layer of a validation, as a line of metrics takes them."""
  return {name: value for name, value in validation.items() if np.ndim(value) < 2}
