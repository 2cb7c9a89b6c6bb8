"""Training with all its side effects: data, checkpoints, metrics, progress. The steps stay pure."""

import dataclasses
import functools
import json
import math
import os
import pathlib
import platform
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax
import jax
import numpy as np

from moe_jax import __version__, sharding
from moe_jax.checkpoint import Checkpoints
from moe_jax.config import Config
from moe_jax.data import Dataset
from moe_jax.errors import InputError
from moe_jax.metric_writer import JsonlWriter, MetricWriter, MultiWriter, TensorBoardWriter
from moe_jax.ops import stats
from moe_jax.ops.dispatch import default_group_size
from moe_jax.progress import TrainingProgress
from moe_jax.train_step import EvalSums, TrainState, init_state, make_eval_step, make_train_step


class CompiledSteps(NamedTuple):
  """The jitted functions of a run on a mesh, and the layout of its state."""

  init: Callable[[int], TrainState]
  train: Callable[[TrainState, dict], tuple[TrainState, dict]]
  evaluate: Callable[[TrainState, dict], EvalSums]
  abstract_state: TrainState
  state_shardings: TrainState


def compile_steps(
  config: Config, vocab_size: int, num_domains: int, mesh: jax.sharding.Mesh
) -> CompiledSteps:
  """The steps of `config` on `mesh`; runs that differ only in seeds share them, compiled once."""
  train = dataclasses.replace(config.train, seed=0, tensorboard=True)
  data = dataclasses.replace(config.data, data_seed=0)
  return _compile_steps(dataclasses.replace(config, train=train, data=data), vocab_size, num_domains, mesh)


@functools.lru_cache(maxsize=16)
def _compile_steps(
  config: Config, vocab_size: int, num_domains: int, mesh: jax.sharding.Mesh
) -> CompiledSteps:
  abstract = jax.eval_shape(lambda: init_state(config, vocab_size, 0))
  shardings = sharding.state_shardings(mesh, abstract)
  batch, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  return CompiledSteps(
    init=jax.jit(lambda seed: init_state(config, vocab_size, seed), out_shardings=shardings),
    train=jax.jit(
      make_train_step(config, vocab_size),
      in_shardings=(shardings, batch),
      out_shardings=(shardings, everywhere),
      donate_argnums=0,
    ),
    evaluate=jax.jit(
      make_eval_step(config, vocab_size, num_domains),
      in_shardings=(shardings, batch),
      out_shardings=everywhere,
    ),
    abstract_state=abstract,
    state_shardings=shardings,
  )


def check_run(config: Config, mesh: jax.sharding.Mesh) -> None:
  """Raises `InputError` for what only the whole configuration shows: divisibility by groups and mesh."""
  length, moe = config.data.sequence_length, config.model.moe
  micro = config.data.batch_size // config.train.accumulation
  group = moe.group_size or default_group_size(moe.dispatcher, length)
  if micro * length % group or (length % group and group % length):
    raise InputError(
      f"--group_size={group}: must divide sequence_length={length}, or be a multiple of it that divides "
      f"the {micro * length} tokens of a micro-batch"
    )
  sharding.check_divides(
    mesh, micro_batch=micro, num_experts=moe.num_experts, num_groups=micro * length // group
  )


class _Tail:
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


class Run:
  """One training run in one folder. `Run(...).train()` starts or continues it and gives its result.

  Args:
    config: checked here, before anything is compiled.
    dataset: what to train and evaluate on.
    folder: gets metrics.jsonl, result.json, checkpoints/ and tensorboard/.
    progress: where to show the numbers; None: nowhere.
    label: of the run, in the result.
    show: of the run, on the progress bar; empty: the label.

  Raises:
    InputError: a wrong field, or a loss that is no longer finite.
  """

  def __init__(
    self,
    config: Config,
    dataset: Dataset,
    folder: str | os.PathLike[str],
    progress: TrainingProgress | None = None,
    label: str = "",
    show: str = "",
  ):
    self.config, self.dataset, self.label, self.show = config.check(), dataset, label, show or label
    self.folder = pathlib.Path(folder)
    self.progress = progress
    self.mesh = sharding.make_mesh(config.mesh)
    check_run(config, self.mesh)
    self.tail = _Tail(config)
    self.seconds, self.timed_steps, self.compile_seconds = 0.0, 0, 0.0

  def train(self) -> dict[str, Any]:
    """Trains to `num_steps`, from the newest checkpoint if there is one, and writes result.json."""
    info = self.dataset.info
    with jax.set_mesh(self.mesh):
      self.steps = compile_steps(self.config, info.vocab_size, len(info.domains), self.mesh)
      self.checkpoints = Checkpoints(self.folder / "checkpoints")
      self.batches = self.dataset.train_batches(
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        data_seed=self.config.data.data_seed,
      )
      state = self._start()
      if self.progress:
        self.progress.start_run(self.show, self.config.train.num_steps)
      with self._writer(int(state.step)) as writer:
        state = self._loop(state, writer)
        validation = self.evaluate(state)
      self.checkpoints.close()
    result = self._result(state, validation)
    if jax.process_index() == 0:
      _write_json(self.folder / "result.json", result)
    if self.progress:
      self.progress.finish_run()
    return result

  def _start(self) -> TrainState:
    if self.checkpoints.latest_step is None:
      return self.steps.init(self.config.train.seed)
    state, extra = self.checkpoints.restore(self.steps.abstract_state, self.steps.state_shardings)
    self.batches.set_state(extra["data"])
    self.tail.from_json(extra["tail"])
    self.seconds, self.timed_steps = extra["seconds"], extra["timed_steps"]
    if self.progress:
      self.progress.note(f"{self.show}: continues from step {int(state.step)}")
    return state

  def _writer(self, step: int) -> MetricWriter:
    if jax.process_index() != 0:
      return MultiWriter([])
    writers: list[MetricWriter] = [JsonlWriter(self.folder / "metrics.jsonl", resume_step=step)]
    if self.config.train.tensorboard:
      writers.append(TensorBoardWriter(self.folder / "tensorboard", resume_step=step))
    return MultiWriter(writers)

  def _loop(self, state: TrainState, writer: MetricWriter) -> TrainState:
    train = self.config.train
    pending: list[dict] = []
    started = time.monotonic()
    start_step = int(state.step)
    for step in range(start_step + 1, train.num_steps + 1):
      state, metrics = self.steps.train(state, self._on_devices(next(self.batches)))
      pending.append(metrics)
      last = step == train.num_steps
      evaluate = train.eval_every and step % train.eval_every == 0 and not last
      save = last or (train.checkpoint_every and step % train.checkpoint_every == 0)
      first = step == start_step + 1
      if first or step % train.log_every == 0 or last or evaluate or save:
        # Reading the metrics waits for the steps, so time is taken after it.
        values = self._read(step, pending)
        elapsed = time.monotonic() - started
        if first:
          self.compile_seconds = elapsed
        else:
          self.seconds, self.timed_steps = self.seconds + elapsed, self.timed_steps + len(pending)
        pending = []
        self._log(step, values, writer)
        if evaluate:
          writer.write(step, {f"eval_{k}": v for k, v in _scalars(self.evaluate(state)).items()})
        if save:
          self.checkpoints.save(step, state, self._extra())
        started = time.monotonic()
    return state

  def _read(self, step: int, pending: list[dict]) -> dict[str, np.ndarray]:
    """The metrics of `step`; those of the steps before it in `pending` go into the tail means."""
    values = jax.device_get(pending)
    for offset, metrics in enumerate(values):
      at = step - len(values) + 1 + offset
      if not (np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])):
        self._stop_non_finite(at, metrics)
      self.tail.add(at, metrics)
    return values[-1]

  def _stop_non_finite(self, step: int, metrics: dict[str, np.ndarray]) -> None:
    latest = self.checkpoints.latest_step
    self.checkpoints.close()
    kept = "there is no earlier checkpoint (see --checkpoint_every)"
    if latest is not None:
      kept = f"the checkpoint of step {latest} in {self.checkpoints.folder} is good"
    raise InputError(
      f"--learning_rate={self.config.optimizer.learning_rate:g}: {self.show or 'the run'} has loss "
      f"{metrics['loss']:g} and gradient norm {metrics['grad_norm']:g} at step {step}; {kept}; try a lower "
      "learning rate"
    )

  def _log(self, step: int, values: dict[str, np.ndarray], writer: MetricWriter) -> None:
    speed = self.timed_steps * self._tokens_per_step / self.seconds if self.seconds else 0.0
    writer.write(step, values | ({"tokens_per_second": speed} if speed else {}))
    if self.progress:
      self.progress.update(step, float(values["loss"]), float(values["max_vio"].mean()), speed)

  def _extra(self) -> dict[str, Any]:
    return {
      "data": self.batches.get_state(),
      "tail": self.tail.to_json(),
      "seconds": self.seconds,
      "timed_steps": self.timed_steps,
    }

  @property
  def _tokens_per_step(self) -> int:
    return self.config.data.batch_size * self.config.data.sequence_length

  def _on_devices(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    layout = sharding.batch_sharding(self.mesh)
    return {name: jax.make_array_from_process_local_data(layout, x) for name, x in batch.items()}

  def evaluate(self, state: TrainState) -> dict[str, Any]:
    """The `validation` part of a result: ratios of sums over the validation set, per layer."""
    total = None
    for batch in self.dataset.validation_batches(
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      limit=self.config.train.eval_batches,
    ):
      sums = self.steps.evaluate(state, self._on_devices(batch))
      sums = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(sums))
      total = sums if total is None else jax.tree.map(np.add, total, sums)
    return validation_summary(total)

  def _result(self, state: TrainState, validation: dict[str, Any]) -> dict[str, Any]:
    info, tail = self.dataset.info, self.tail.means()
    num_params, num_active = count_params(self.config, state)
    return {
      "arm": self.label,
      "seed": self.config.train.seed,
      "num_steps": self.config.train.num_steps,
      "tokens_per_step": self._tokens_per_step,
      "num_params": num_params,
      "num_active_params": num_active,
      "dataset": info.name,
      "fingerprint": info.fingerprint,
      "domains": list(info.domains),
      "entropy_rate": info.entropy_rate,
      "validation_floor": info.validation_floor,
      "validation": validation,
      "training": {
        "loss_tail": tail["loss"],
        "max_vio_batch_tail": tail["max_vio"],
        "dropped_fraction_tail": tail["dropped_fraction"],
        "tail_steps": self.tail.count,
        "tokens_per_second": self.timed_steps * self._tokens_per_step / max(self.seconds, 1e-9),
        "seconds": self.seconds,
        "compile_seconds": self.compile_seconds,
      },
      "versions": versions(),
      "device": f"{jax.devices()[0].device_kind} x {jax.device_count()}",
    }


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


def _scalars(validation: dict[str, Any]) -> dict[str, Any]:
  return {name: value for name, value in validation.items() if name not in ("load", "load_by_domain")}


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


def _write_json(path: pathlib.Path, value: Any) -> None:
  """Whole or not at all: a result.json that exists is complete."""
  temporary = path.with_suffix(".tmp")
  temporary.write_text(json.dumps(value, indent=1))
  temporary.replace(path)
