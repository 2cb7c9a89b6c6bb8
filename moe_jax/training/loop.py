"""Training with all its side effects: data, checkpoints, metrics, progress. The steps stay pure."""

import contextlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from moe_jax import sharding
from moe_jax.cluster import processes
from moe_jax.config import Config
from moe_jax.config.plain import to_plain
from moe_jax.data import Dataset
from moe_jax.data.cache import write_whole
from moe_jax.errors import NonFiniteLoss
from moe_jax.nn.build import different_blocks, routed_part
from moe_jax.nn.leaks import sees_later_tokens
from moe_jax.ops.dispatch import expert_capacity
from moe_jax.training.checkpoint import Checkpoints
from moe_jax.training.compiled import check_run, compile_steps
from moe_jax.training.load import CONFIG_FILE, TOKENIZER_FILE, Loaded, load_run, write_json
from moe_jax.training.metric_writer import JsonlWriter, MetricWriter, MultiWriter, TensorBoardWriter
from moe_jax.training.progress import TrainingProgress
from moe_jax.training.protocol import protocol_of
from moe_jax.training.results import TailMeans, count_params, table_columns, validation_summary, versions
from moe_jax.training.router_trace import FOLDER, TraceWriter
from moe_jax.training.start import start_from
from moe_jax.training.step import EvalSums, TrainState


class Run:
  """One training run in one folder. `Run(...).train()` starts or continues it and gives its result.

  Args:
    config: checked here, and its names resolved, before anything is compiled.
    dataset: what to train and evaluate on.
    folder: gets config.json, metrics.jsonl, result.json, checkpoints/, tensorboard/, router_logits/ if asked for, and
      tokenizer.json if the data set trained one.
    progress: where to show the numbers; None: nowhere.
    label: of the run, in the result.
    show: of the run, on the progress bar; empty: the label.
    stop: gets the numbers of every evaluation in training (`eval_every`), as `evaluate` returns them. If it is true of
      them, the run ends at that step, and its result is that of a whole run but for `num_steps`. None: never.

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
    stop: Callable[[dict[str, Any]], bool] | None = None,
  ):
    self.stop = stop
    self.dataset, self.label, self.show = dataset, label, show or label
    self.folder = pathlib.Path(folder)
    self.progress = progress
    self.mesh = sharding.make_mesh(config.check().mesh)
    self.config = check_run(config, self.mesh)
    self.share = processes.batch_share(sharding.batch_sharding(self.mesh), config.data.batch_size)
    self.tail = TailMeans(config)
    self.seconds, self.timed_steps, self.compile_seconds = 0.0, 0, 0.0

  def train(self) -> dict[str, Any]:
    """Trains to `num_steps` or to its stop, from the newest checkpoint if there is one, and writes result.json."""
    with jax.set_mesh(self.mesh), contextlib.ExitStack() as stack:
      info = self.dataset.info
      self.steps = compile_steps(self.config, info.vocab_size, len(info.domains), self.mesh)
      self.checkpoints = Checkpoints(self.folder / "checkpoints")
      # On every way out: a save under way must not meet the next manager.
      stack.callback(self.checkpoints.close)
      self.batches = self.dataset.train_batches(
        process_index=self.share.index,
        process_count=self.share.count,
        data_seed=self.config.data.data_seed,
      )
      state = self._start()
      self._write_config()  # not before: a folder that is refused stays as it is
      if self.progress:
        self.progress.start_run(self.show, self.config.train.num_steps)
      writer = stack.enter_context(self._writer(int(state.step)))
      recorder = stack.enter_context(self._recorder(int(state.step)))
      state = self._loop(state, writer, recorder)
      validation = self.evaluate(state)
    result = self._result(validation, int(state.step))
    if processes.is_first():
      write_json(self.folder / "result.json", result)
    if self.progress:
      self.progress.finish_run()
    return result

  def _write_config(self) -> None:
    """What `load` needs to make the model again."""
    if processes.is_first():
      values = self.config.to_dict() | {
        "vocab_size": self.dataset.info.vocab_size,
        "domains": list(self.dataset.info.domains),
      }
      tokenizer = self.dataset.tokenizer
      if tokenizer and tokenizer.content is not None:
        write_whole(self.folder / TOKENIZER_FILE, tokenizer.content)
      write_json(self.folder / CONFIG_FILE, values)

  @staticmethod
  def load(folder: str | os.PathLike[str]) -> Loaded:
    """A run of an earlier process: see `moe_jax.training.load.load_run`."""
    return load_run(folder)

  def _start(self) -> TrainState:
    if self.checkpoints.latest_step is None:
      if self.config.train.init_from:
        return start_from(self.steps, self.config, self.mesh)
      return self.steps.init(self.config.train.seed)
    state, extra = self.checkpoints.restore(self.steps.abstract_state, self.steps.state_shardings)
    self.batches.set_state(self.share.state_to_load(extra["data"]))
    self.tail.from_json(extra["tail"])
    self.seconds, self.timed_steps = extra["seconds"], extra["timed_steps"]
    if self.progress:
      self.progress.note(f"{self.show}: continues from step {int(state.step)}")
    return state

  def _writer(self, step: int) -> MetricWriter:
    if not processes.is_first():
      return MultiWriter([])
    writers: list[MetricWriter] = [JsonlWriter(self.folder / "metrics.jsonl", resume_step=step)]
    if self.config.train.tensorboard:
      writers.append(TensorBoardWriter(self.folder / "tensorboard", resume_step=step))
    return MultiWriter(writers)

  def _recorder(self, step: int) -> contextlib.AbstractContextManager[TraceWriter | None]:
    if not processes.is_first() or not self.config.train.record_router_logits:
      return contextlib.nullcontext()
    return TraceWriter(self.folder / FOLDER, self._trace_header(), resume_step=step)

  def _loop(self, state: TrainState, writer: MetricWriter, recorder: TraceWriter | None) -> TrainState:
    train = self.config.train
    pending: list[dict] = []
    start_step = int(state.step)
    if self.stop and start_step and self._evaluates(start_step) and self.stop(self.evaluate(state)):
      return state  # an earlier process stopped here, and ended before it wrote the result
    started = time.monotonic()
    for step in range(start_step + 1, train.num_steps + 1):
      state, metrics = self.steps.train(state, self._on_devices(next(self.batches)))
      trace = metrics.pop("router_trace", None)
      if recorder and step % train.record_router_logits == 0:
        recorder.add(step, trace)
      pending.append(metrics)
      last = step == train.num_steps
      evaluate = self._evaluates(step)
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
        stopped = False
        if evaluate:
          validation = self.evaluate(state)
          writer.write(step, {f"eval_{k}": v for k, v in _scalars(validation).items()})
          stopped = self.stop is not None and self.stop(validation)
        if save or stopped:
          if recorder:
            recorder.flush()  # a run that continues from here has all steps up to here
          self.checkpoints.save(step, state, self._extra())
        if stopped:
          break
        started = time.monotonic()
    return state

  def _evaluates(self, step: int) -> bool:
    """Returns whether `step` is followed by an evaluation in training. That of the last step is the result."""
    every = self.config.train.eval_every
    return every > 0 and step % every == 0 and step < self.config.train.num_steps

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
    kept = "there is no earlier checkpoint (see --checkpoint_every)"
    if latest is not None:
      kept = f"the checkpoint of step {latest} in {self.checkpoints.folder} is good"
    raise NonFiniteLoss(
      f"--learning_rate={self.config.optimizer.learning_rate:g}: {self.show or 'the run'} has loss "
      f"{metrics['loss']:g} and gradient norm {metrics['grad_norm']:g} at step {step}; {kept}; try a lower "
      "learning rate"
    )

  def _log(self, step: int, values: dict[str, np.ndarray], writer: MetricWriter) -> None:
    speed = self.timed_steps * self._tokens_per_step / self.seconds if self.seconds else 0.0
    writer.write(step, values | ({"tokens_per_second": speed} if speed else {}))
    if self.progress:
      max_vio = float(np.mean(values["max_vio"])) if "max_vio" in values else 0.0
      self.progress.update(step, float(values["loss"]), max_vio, speed)

  def _extra(self) -> dict[str, Any]:
    return {
      "data": self.share.state_to_save(self.batches.get_state()),
      "tail": self.tail.to_json(),
      "seconds": self.seconds,
      "timed_steps": self.timed_steps,
    }

  def _trace_header(self) -> dict[str, Any]:
    length, info = self.config.data.sequence_length, self.dataset.info
    block = next(b for b in different_blocks(self.config.model) if routed_part(b) is not None)
    layer, k = routed_part(block), block.moe.num_experts_per_token
    group = layer.tokens_per_group(length)
    return {
      "router": str(block.moe.router),
      "num_experts": layer.num_experts,
      "num_scored_experts": layer.num_scored_experts,
      "num_experts_per_token": k,
      "group_size": group,
      "capacity": expert_capacity(group, k, layer.capacity_factor, layer.num_experts),
      "domains": list(info.domains),
      "fingerprint": info.fingerprint,
      "config": self.config.to_dict(),
    }

  @property
  def _tokens_per_step(self) -> int:
    return self.config.data.batch_size * self.config.data.sequence_length

  def evaluate_as(self, configs: Mapping[str, Config]) -> dict[str, Any]:
    """Evaluates the finished run under other configurations, without training, and adds that to result.json.

    Args:
      configs: by name. They may differ from the run's in what only evaluation reads: capacity, dispatcher,
        routing groups, the objective.

    Returns:
      The result, with `evaluations[name]`: the numbers of `validation`, and whether that model
      `sees_later_tokens`.

    Raises:
      InputError: if a configuration has other parameters than the run.
    """
    with jax.set_mesh(self.mesh), contextlib.ExitStack() as stack:
      info = self.dataset.info
      steps = [compile_steps(c, info.vocab_size, len(info.domains), self.mesh) for c in configs.values()]
      checkpoints = Checkpoints(self.folder / "checkpoints")
      stack.callback(checkpoints.close)
      found = {}
      for (name, config), of_config in zip(configs.items(), steps, strict=True):
        # Restored for each: checked against its arrays, and laid out for its program.
        state, _ = checkpoints.restore(of_config.abstract_state, of_config.state_shardings)
        sees_later = sees_later_tokens(check_run(config, self.mesh).model)
        found[name] = {"sees_later_tokens": sees_later} | _scalars(self.evaluate(state, of_config.evaluate))
    path = self.folder / "result.json"
    result = json.loads(path.read_text())
    result["evaluations"] = result.get("evaluations", {}) | found
    if processes.is_first():
      write_json(path, result)
    return result

  def _on_devices(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    layout = sharding.batch_sharding(self.mesh)
    whole = self.config.data.batch_size
    return {
      name: jax.make_array_from_process_local_data(layout, x[self.share.rows], (whole, *x.shape[1:]))
      for name, x in batch.items()
    }

  def evaluate(self, state: TrainState, step: Callable[..., EvalSums] | None = None) -> dict[str, Any]:
    """The `validation` part of a result: ratios of sums over the validation set, per layer.

    `step` evaluates a batch; None: as the run is configured.
    """
    total, step = None, step or self.steps.evaluate
    limit = self.config.train.eval_batches
    for batch in self.dataset.validation_batches(
      process_index=self.share.index,
      process_count=self.share.count,
      limit=limit,
    ):
      sums = step(state, self._on_devices(batch))
      sums = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(sums))
      total = sums if total is None else jax.tree.map(np.add, total, sums)
    num_bytes = None
    if self.config.model.causal:
      num_bytes = self.dataset.validation_bytes(float(total.num_targets), limit)
    return validation_summary(total, num_bytes)

  def _result(self, validation: dict[str, Any], num_steps: int) -> dict[str, Any]:
    info = self.dataset.info
    num_params, num_active = count_params(self.steps.model)
    return {
      "arm": self.label,
      "seed": self.config.train.seed,
      "num_steps": num_steps,
      "tokens_per_step": self._tokens_per_step,
      "objective": str(self.config.train.objective),
      "sees_later_tokens": sees_later_tokens(self.config.model),
      "schedule": to_plain(self.config.optimizer),
      **protocol_of(self.config),
      "num_params": num_params,
      "num_active_params": num_active,
      "dataset": info.name,
      "fingerprint": info.fingerprint,
      "domains": list(info.domains),
      "entropy_rate": info.entropy_rate,
      "validation_floor": info.validation_floor,
      "bytes_per_token": info.bytes_per_token,
      **({"yardsticks": info.yardsticks} if info.yardsticks and self.config.model.causal else {}),
      "columns": table_columns(),
      "validation": validation,
      "training": {
        **self.tail.means(),
        "tail_steps": self.tail.count,
        "tokens_per_second": self.timed_steps * self._tokens_per_step / max(self.seconds, 1e-9),
        "seconds": self.seconds,
        "compile_seconds": self.compile_seconds,
      },
      "versions": versions(),
      "device": f"{jax.devices()[0].device_kind} x {jax.device_count()}",
    }


def _scalars(validation: dict[str, Any]) -> dict[str, Any]:
  """Numbers and numbers per layer, as a line of metrics takes them."""
  return {name: value for name, value in validation.items() if np.ndim(value) < 2}
