"""Evaluations beside that of the result: between steps of training, and of finished runs under other configurations."""

import contextlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax

from moe_jax.cluster import processes
from moe_jax.config import Config
from moe_jax.training.checkpoint import Checkpoints
from moe_jax.training.compiled import check_run, compile_steps
from moe_jax.training.identity import hold
from moe_jax.training.load import CHECKPOINTS, check_step
from moe_jax.training.memory import make_room_for_programs
from moe_jax.training.metric_writer import MetricWriter
from moe_jax.training.own_leaks import sees_later_tokens
from moe_jax.training.result_file import RESULT_FILE, read_result, write_result
from moe_jax.training.results import evaluation_digest, scalars
from moe_jax.training.step import EvalSums, TrainState

if TYPE_CHECKING:
  from moe_jax.training.loop import Run


class _Told(Exception):
  """Leaves an evaluation, with the reason why the run stops."""


def evaluate_in_training(
  run: "Run", step: int, state: TrainState, writer: MetricWriter, told: Callable[[], str]
) -> tuple[bool, str]:
  """Writes a line with the numbers of an evaluation, if there is none yet.

  `told` says at each batch, and at the end, why the run is to stop. Then what is not evaluated yet is left to the next process.

  Returns:
    Whether the run stops at the numbers, and why it stops anyway; empty: it does not.
  """
  if run.evaluated >= step and not run.stop:
    return False, ""

  def evaluate_batch(*args: Any) -> EvalSums:
    if reason := told():
      raise _Told(reason)
    return run.steps.evaluate(*args)

  try:
    validation = run.evaluate(state, evaluate_batch)
  except _Told as left:
    return False, str(left)
  if run.evaluated < step:
    writer.write(step, {f"eval_{k}": v for k, v in scalars(validation).items()})
    run.evaluated = step
  return run.stop is not None and run.stop(validation), told()


def evaluate_as(run: "Run", configs: Mapping[str, Config]) -> dict[str, Any]:
  """Evaluates the finished run under other configurations, and adds that to result.json.

  Args:
    run: of a folder that has a result.
    configs: by name. They may differ from the run's in what only evaluation reads: capacity, dispatcher, routing groups,
      the objective.

  Returns:
    The result, with `evaluations[name]`: the numbers of `validation`, and whether that model `sees_later_tokens` (None: not known); and
    with `evaluation_digests[name]`, which tell configurations apart.

  Raises:
    InputError: if another process has the folder, or a configuration has other parameters than the run.
  """
  path = run.folder / RESULT_FILE
  with (
    hold([(run.folder, str(run.folder))]),
    jax.set_mesh(run.mesh),
    contextlib.closing(Checkpoints(run.folder / CHECKPOINTS)) as checkpoints,
  ):
    result, info = read_result(path), run.dataset.info
    configs = {name: check_run(config, run.mesh) for name, config in configs.items()}
    steps = [compile_steps(c, info.vocab_size, len(info.domains), run.mesh) for c in configs.values()]
    found, digests = {}, {name: evaluation_digest(config) for name, config in configs.items()}
    for (name, config), of_config in zip(configs.items(), steps, strict=True):
      make_room_for_programs()
      # Restored for each: checked against its arrays, and laid out for its program.
      state, _ = checkpoints.restore(of_config.abstract_state, of_config.state_shardings)
      check_step(run.folder, result, int(state.step))
      sees_later = sees_later_tokens(config.model)
      found[name] = {"sees_later_tokens": sees_later} | scalars(run.evaluate(state, of_config.evaluate))
    for part, new in (("evaluations", found), ("evaluation_digests", digests)):
      result[part] = result.get(part, {}) | new
    if processes.is_first():
      write_result(path, result)
  return result
