"""Training with all its side effects: data, checkpoints, metrics, progress. The steps stay pure."""

import contextlib
import dataclasses
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from moe_jax import disk, sharding
from moe_jax.cluster import processes
from moe_jax.cluster.signals import Between
from moe_jax.config import Config
from moe_jax.data import Dataset
from moe_jax.data.text_folder import check_outside
from moe_jax.errors import Stopped
from moe_jax.training import continuing
from moe_jax.training.checkpoint import Checkpoints
from moe_jax.training.compiled import check_run, compile_steps
from moe_jax.training.digests import with_bad_numbers
from moe_jax.training.evaluation import evaluate_in_training
from moe_jax.training.identity import check_same_run, hold, write_identity
from moe_jax.training.load import CHECKPOINTS, Loaded, load_run
from moe_jax.training.memory import check_memory, make_room_for_programs
from moe_jax.training.metric_writer import JsonlWriter, MetricWriter, MultiWriter, TensorBoardWriter
from moe_jax.training.progress import TrainingProgress
from moe_jax.training.protocol import trace_header
from moe_jax.training.result_file import RESULT_FILE, is_result, write_result
from moe_jax.training.results import TailMeans, result_of, validation_summary
from moe_jax.training.router_trace import FOLDER, TraceWriter
from moe_jax.training.step import EvalSums, TrainState
from moe_jax.training.stops import Stops, in_words, not_finite, numbers_of_step


class Run:
  """One training run in one folder. `Run(...).train()` starts or continues it and gives its result.

  Args:
    config: checked here, and its names resolved, before anything is compiled. The run's own says `dataset.info.name`.
    dataset: what to train and evaluate on.
    folder: gets config.json, metrics.jsonl, result.json, checkpoints/, tensorboard/, router_logits/ if asked for, and
      tokenizer.json if the data set trained one.
    progress: where to show the numbers; None: nowhere.
    label: of the run, in the result.
    show: of the run, on the progress bar; empty: the label.
    starts: digests of the parameters that folders of `init_from` had when other runs started from them. One that has others
      now is refused.
    stop: gets the numbers of every evaluation in training (`eval_every`), as `evaluate` returns them. If it is true of
      them, the run ends at that step, and its result is that of a whole run but for `num_steps`. None: never.

  Raises:
    InputError: a wrong field, a folder in that of the text, or a loss that is no longer finite.
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
    starts: Mapping[str, str] | None = None,
  ):
    make_room_for_programs()
    self.stop = stop
    self.dataset, self.label, self.show = dataset, label, show or label
    self.folder = pathlib.Path(folder)
    self.progress = progress
    self.mesh = sharding.make_mesh(config.check().mesh)
    data = dataclasses.replace(config.data, dataset=dataset.info.name)  # it may be one of the caller's
    self.config = check_run(dataclasses.replace(config, data=data), self.mesh)
    check_outside(self.folder, self.config.data)
    self.share = processes.batch_share(sharding.batch_sharding(self.mesh), config.data.batch_size)
    self.tail = TailMeans(config)
    self.seconds, self.timed_steps, self.compile_seconds = 0.0, 0, 0.0
    self.start_digest = ""  # of the parameters that init_from named
    self.starts = starts or {}
    self.checkpoints: Checkpoints | None = None  # in `train`
    self.metrics: JsonlWriter | None = None  # in the first process, in `train`
    self.evaluated = 0  # the last step with an evaluation in training
    # Whether the last evaluation was of the whole validation set.
    self.evaluated_all = not config.train.eval_batches
    self.lines = 0  # of metrics up to the step that the run continues from

  def train(self) -> dict[str, Any]:
    """Trains to `num_steps` or to its stop, from the newest whole checkpoint if there is one, and writes result.json.

    Raises:
      InputError: another process has the folder, what it holds is of another configuration or text, a number is no
        longer finite, or memory or disk space do not suffice.
      Stopped: after a signal or `max_minutes`, when the step is saved.
    """
    try:
      with Between(), jax.set_mesh(self.mesh), hold([(self.folder, str(self.folder))]):
        return self._train()
    except Exception as error:
      line = in_words(error, self.show, self.folder, self._what_continues())
      if line is None:
        raise
      raise line from error

  def _train(self) -> dict[str, Any]:
    info = self.dataset.info
    check_same_run(self.folder, self.config, info.fingerprint)
    with contextlib.ExitStack() as stack:
      train = self.config.train
      self.stops = stack.enter_context(Stops(train.max_minutes, train.checkpoint_minutes))
      # It reads a teacher, which the processes compare. While a step is traced, they could not.
      self.unchanging = continuing.unchanging(self)
      self.steps = compile_steps(self.config, info.vocab_size, len(info.domains), self.mesh)
      check_memory(self.config, self.steps, info.vocab_size, self.mesh)
      self.checkpoints = Checkpoints(self.folder / CHECKPOINTS)
      # On every way out: a save under way must not meet the next manager.
      stack.callback(self.checkpoints.close)
      self.batches = self.dataset.train_batches(
        process_index=self.share.index,
        process_count=self.share.count,
        data_seed=self.config.data.data_seed,
      )
      state = continuing.start(self)
      continuing.check_start(self)
      with processes.refused_together():  # what is damaged, and cannot be moved aside
        if processes.is_first():  # not before: a folder that is refused stays as it is
          disk.set_aside_damaged(
            self.folder / RESULT_FILE, self.folder, "it is made again from the last checkpoint", is_result
          )
          write_identity(self.folder, self.config, self.dataset)
        writer = stack.enter_context(self._writer(int(state.step)))
        recorder = stack.enter_context(self._recorder(int(state.step)))
      if self.progress:
        self.progress.start_run(self.show, self.config.train.num_steps, int(state.step))
      if train.checkpoint_minutes or train.checkpoint_every:
        self.checkpoints.prepare(state)
      state = self._loop(state, writer, recorder)
      self.checkpoints.wait()
      if reason := self.stops.ended():  # asked for while the last step was saved
        self._end(int(state.step), reason)
      validation = self.evaluate(state)
      self._check_finite(int(state.step), {"validation loss": validation["nll"]})
    result = result_of(self, validation, int(state.step))
    if processes.is_first():
      write_result(self.folder / RESULT_FILE, result)
    if self.progress:
      self.progress.finish_run()
    return result

  @staticmethod
  def load(folder: str | os.PathLike[str]) -> Loaded:
    """A run of an earlier process: see `moe_jax.training.load.load_run`."""
    return load_run(folder)

  def _writer(self, step: int) -> MetricWriter:
    if not processes.is_first():
      return MultiWriter([])
    path = self.folder / continuing.METRICS_FILE
    self.metrics = JsonlWriter(path, resume_step=step, expected=self.lines)
    writers: list[MetricWriter] = [self.metrics]
    if self.config.train.tensorboard:
      events, again = self.folder / "tensorboard", self.metrics.again
      writers.append(TensorBoardWriter(events, resume_step=step, again=again))
    return MultiWriter(writers)

  def _recorder(self, step: int) -> contextlib.AbstractContextManager[TraceWriter | None]:
    if not processes.is_first() or not self.config.train.record_router_logits:
      return contextlib.nullcontext()
    return TraceWriter(self.folder / FOLDER, trace_header(self.config, self.dataset.info), resume_step=step)

  def _loop(self, state: TrainState, writer: MetricWriter, recorder: TraceWriter | None) -> TrainState:
    train = self.config.train
    pending: list[dict] = []
    start_step = int(state.step)
    if start_step and self._evaluates(start_step):
      reached, reason = evaluate_in_training(self, start_step, state, writer, self.stops.told)
      if reason:
        self._end(start_step, reason)
      if reached:
        return state  # an earlier process stopped here, and ended before it wrote the result
    started = time.monotonic()
    for step in range(start_step + 1, train.num_steps + 1):
      state, metrics = self.steps.train(state, self._on_devices(next(self.batches)))
      trace = metrics.pop("router_trace", None)
      if recorder and step % train.record_router_logits == 0:
        recorder.add(step, trace)
      pending.append(metrics)
      reason = self.stops.reached()
      first, last, evaluate = step == start_step + 1, step == train.num_steps, self._evaluates(step)
      # Lines are at the same steps, however often the run was stopped or saved.
      log = step == 1 or step % train.log_every == 0 or last or evaluate
      save = bool(reason) or last or (train.checkpoint_every > 0 and step % train.checkpoint_every == 0)
      together = first or log or save  # all processes wait for the step
      save = save or self.stops.due(together, self.checkpoints.has_failed)
      if not (together or save):
        continue
      # Reading the metrics waits for the steps, so time is taken after it.
      values = self._read(step, pending)
      elapsed = time.monotonic() - started
      if first:
        self.compile_seconds = elapsed
      else:
        self.seconds, self.timed_steps = self.seconds + elapsed, self.timed_steps + len(pending)
      pending = []
      if log:
        self._log(step, values, writer)
      # One that is asked to stop has little time: it saves, and the next process evaluates.
      reached = False
      if evaluate and not reason:
        reached, reason = evaluate_in_training(self, step, state, writer, self.stops.reached)
      if save or reached or reason:
        steps_follow = not (last or reason or reached)
        self._save(step, state, writer, recorder, steps_follow)
      if reason:
        self._end(step, reason)
      if reached:
        break
      started = time.monotonic()
    return state

  def _save(
    self, step: int, state: TrainState, writer: MetricWriter, recorder: TraceWriter | None, steps_follow: bool
  ) -> None:
    """A run that continues from here has all metrics and recorded steps up to here."""
    parts = {"parameters": state.params, "optimizer": state.opt_state, "balancers": state.variables}
    position = [self.share.index, self.batches.get_state()]
    # One exchange for all. In each, a process waits until the others get a core.
    told = processes.from_all(
      [with_bad_numbers(parts), position, self.checkpoints.before_save(state, steps_follow)]
    )
    bad, positions, said = zip(*told, strict=True)
    if wrong := set().union(*bad):  # the numbers of a step are of the state before its update
      self._check_finite(step + 1, {name: np.nan for name in parts if name in wrong})
    writer.flush()
    if recorder:
      recorder.flush()
    first = [self.metrics.path] if self.metrics else []
    kept = continuing.kept_beside(self, processes.merge_states(dict(positions)))
    self.checkpoints.save(step, state, kept, steps_follow=steps_follow, first=first, said=said)
    self.stops.saved()

  def _what_continues(self) -> str:
    """What the same command does after an error, in words."""
    step = self.checkpoints.latest_step if self.checkpoints else None
    return "begins anew (there is no checkpoint)" if step is None else f"continues from step {step}"

  def _end(self, step: int, reason: str) -> None:
    self.checkpoints.wait()
    raise Stopped(
      f"{self.show or self.folder}: stopped by {reason}; step {step} of {self.config.train.num_steps} is saved in "
      f"{self.checkpoints.folder}, and the same command continues from it"
    )

  def _evaluates(self, step: int) -> bool:
    """Returns whether `step` is followed by an evaluation in training. That of the last step is the result."""
    every = self.config.train.eval_every
    return every > 0 and step % every == 0 and step < self.config.train.num_steps

  def _read(self, step: int, pending: list[dict]) -> dict[str, np.ndarray]:
    """The metrics of `step`; those of the steps before it in `pending` go into the tail means."""
    values = jax.device_get(pending)
    for offset, metrics in enumerate(values):
      at = step - len(values) + 1 + offset
      self._check_finite(at, numbers_of_step(metrics))
      self.tail.add(at, metrics)
    return values[-1]

  def _check_finite(self, step: int, numbers: dict[str, float]) -> None:
    wrong = {name: value for name, value in numbers.items() if not np.isfinite(value)}
    if not wrong:
      return
    self.checkpoints.wait()
    kept = "there is no earlier checkpoint"
    if self.checkpoints.latest_step is not None:
      kept = f"the checkpoint of step {self.checkpoints.latest_step} in {self.checkpoints.folder} is good"
    words = " and ".join(f"{name} {value:g}" for name, value in wrong.items())
    raise not_finite(self.show, step, words, kept, self.config.optimizer.learning_rate)

  def _log(self, step: int, values: dict[str, np.ndarray], writer: MetricWriter) -> None:
    speed = self.timed_steps * self.tokens_per_step / self.seconds if self.seconds else 0.0
    writer.write(step, values | ({"tokens_per_second": speed} if speed else {}))
    if self.progress:
      max_vio = float(np.mean(values["max_vio"])) if "max_vio" in values else 0.0
      self.progress.update(step, float(values["loss"]), max_vio, speed)

  @property
  def tokens_per_step(self) -> int:
    return self.config.data.batch_size * self.config.data.sequence_length

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
    batches = self.dataset.validation_batches(
      process_index=self.share.index, process_count=self.share.count, limit=limit and limit + 1
    )
    self.evaluated_all = True
    for count, batch in enumerate(batches):
      if limit and count == limit:
        self.evaluated_all = False
        break
      sums = step(state, self._on_devices(batch))
      sums = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(sums))
      total = sums if total is None else jax.tree.map(np.add, total, sums)
    num_bytes = None
    if self.config.model.causal:
      num_bytes = self.dataset.validation_bytes(float(total.num_targets), limit)
    return validation_summary(total, num_bytes)
