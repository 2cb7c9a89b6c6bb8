"""What a run keeps beside its arrays, and how the next process continues from it."""

import pathlib
from typing import TYPE_CHECKING, Any

from moe_jax import disk
from moe_jax.cluster import processes
from moe_jax.config.plain import own_code
from moe_jax.errors import InputError
from moe_jax.fingerprint import of_package
from moe_jax.training import identity
from moe_jax.training.changes import lasting
from moe_jax.training.compiled import objective_of
from moe_jax.training.digests import tree_digest
from moe_jax.training.metric_writer import read_lines
from moe_jax.training.own_metrics import own_metrics
from moe_jax.training.protocol import slots_of_mesh
from moe_jax.training.result_file import RESULT_FILE, read_result
from moe_jax.training.start import start_from
from moe_jax.training.step import TrainState

if TYPE_CHECKING:
  from moe_jax.training.loop import Run

METRICS_FILE = "metrics.jsonl"


def kept_beside(run: "Run", data: Any) -> dict[str, Any]:
  """Returns the JSON values that are saved with the state of a step, of which `data` is the position of all processes."""
  return run.unchanging | {
    "data": data,
    "tail": run.tail.to_json(),
    "seconds": run.seconds,
    "timed_steps": run.timed_steps,
    "start": run.start_digest,
    "lines": run.metrics.lines if run.metrics else 0,
    "evaluated": run.evaluated,
  }


def unchanging(run: "Run") -> dict[str, Any]:
  """Returns what `kept_beside` has of a run in all its steps, so that no save waits until it is made."""
  return {
    "config": lasting(run.config),
    "text": run.dataset.info.fingerprint,
    "slots": slots_of_mesh(run.config),
    "own_code": own_code(run.config),
    "own_metrics": own_metrics(),
    "teacher": objective_of(run.config).digest,
    "code": of_package(),
  }


def start(run: "Run") -> TrainState:
  """Returns the state of the newest whole checkpoint, or that before the first step.

  Raises:
    InputError: if the checkpoint is of another run, whatever config.json says, on other text, or of another teacher, or of
      a version that kept less beside it.
  """
  if run.checkpoints.latest_step is None:
    return _new(run)
  state, extra = run.checkpoints.restore(
    run.steps.abstract_state, run.steps.state_shardings, move_damaged=True
  )
  step, text = int(state.step), run.dataset.info.fingerprint
  teacher = objective_of(run.config).digest
  if not {"config", "lines", "evaluated", *(["teacher"] if teacher else [])} <= extra.keys():
    raise InputError(
      f"{run.folder}: step {step} was saved by another version of moe_jax; continue with that one, or choose another folder"
    )
  other = identity.difference(
    f"{run.folder}: step {step} is of a run", identity.said_by(extra), run.config, text, teacher
  )
  if other:
    raise InputError(other)
  run.batches.set_state(run.share.state_to_load(extra["data"]))
  run.tail.from_json(extra["tail"])
  run.start_digest, run.lines = extra["start"], extra["lines"]
  run.evaluated = extra["evaluated"]
  run.seconds, run.timed_steps = extra["seconds"], extra["timed_steps"]
  if run.progress:
    here, code = of_package(), extra.get("code")
    other = "" if code in (None, here) else f", which other code of moe_jax saved (digest {code}, now {here})"
    run.progress.note(f"{run.show}: continues from step {step}{other}")
  return state


def check_start(run: "Run") -> None:
  """Raises `InputError` if other runs started from other parameters in the folder of `init_from`: they come into one table."""
  folder = identity.start_folder(run.config)
  was = run.starts.get(folder, run.start_digest)
  if folder and run.start_digest and was != run.start_digest:
    raise InputError(
      f"{run.folder}: --init_from={folder} has other parameters (digest {run.start_digest}) than when other runs started from it "
      f"({was}); bring those back, or choose another folder"
    )


def _new(run: "Run") -> TrainState:
  if run.config.train.init_from:
    state = start_from(run.steps, run.config, run.mesh, run.dataset.tokenizer)
    run.start_digest = tree_digest(state.params)
  else:
    state = run.steps.init(run.config.train.seed)
  with processes.refused_together():
    if processes.is_first():
      _set_lost_aside(run.folder)
  return state


def _set_lost_aside(folder: pathlib.Path) -> None:
  """Says that a run begins anew although there were steps, and keeps their metrics.

  Raises:
    InputError: if they cannot be moved.
  """
  path = folder / METRICS_FILE
  lines, lost = read_lines(path)
  result = read_result(folder / RESULT_FILE).get("num_steps", 0)
  damaged = [p.name.partition("-")[0] for p in folder.glob(f"{disk.ASIDE}/*-*") if p.is_dir()]
  reached = {
    METRICS_FILE: max((line["step"] for _, line in lines), default=0),
    RESULT_FILE: result,
    f"{disk.ASIDE}/": max((int(name) for name in damaged if name.isdecimal()), default=0),
  }
  known = {name: step for name, step in reached.items() if step}
  place = ""
  if lines or lost:
    moved = disk.move_aside(path, folder, "is of steps without a checkpoint")
    place = f"; {METRICS_FILE} is moved to {moved}"
  if known or place:
    steps = ", ".join(f"{name} says step {step}" for name, step in known.items()) or "there were steps"
    disk.note(f"{folder}: has no checkpoint, so the run begins anew, although {steps}{place}")
