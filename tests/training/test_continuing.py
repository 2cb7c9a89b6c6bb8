"""What a run says and keeps when its folder has lost something, or a save fails; and that bad numbers are not saved."""

import errno
import json
import os
import pathlib
import re
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import pytest

from moe_jax import locks
from moe_jax.analysis.measured import models_of
from moe_jax.comparison.comparison import Comparison
from moe_jax.data import load_dataset
from moe_jax.errors import InputError
from moe_jax.training import idle_saver, loop, objectives
from moe_jax.training.checkpoint import Checkpoints
from moe_jax.training.compiled import compile_steps, make_model, resolve_config
from moe_jax.training.digests import with_bad_numbers
from moe_jax.training.evaluation import evaluate_as
from moe_jax.training.identity import is_shorter
from moe_jax.training.loop import Run
from moe_jax.training.metric_writer import read_jsonl
from moe_jax.training.orbax_writer import OrbaxWriter
from moe_jax.training.result_file import write_result
from moe_jax.training.results import diverged_result
from moe_jax.training.start import save_model
from tests import tiny

CONFIG = tiny.change(tiny.CONFIG, num_steps=6, eval_batches=2, num_layers=1, checkpoint_every=2)
EXTENSIBLE = tiny.change(CONFIG, schedule="constant", warmup_steps=1)
LONGER = tiny.change(EXTENSIBLE, num_steps=7, checkpoint_every=0)


@pytest.fixture(scope="module")
def dataset():
  return load_dataset(CONFIG.data)


@pytest.fixture(scope="module")
def stopped(dataset, tmp_path_factory):
  """The folder of a run that was stopped behind the checkpoints of steps 2 and 4."""
  folder = tmp_path_factory.mktemp("stopped")
  with pytest.raises(KeyboardInterrupt):
    Run(CONFIG, dataset, folder, tiny.StopsAt(5), label="arm").train()
  return folder


@pytest.fixture
def left(stopped, tmp_path):
  """A copy of that folder."""
  return pathlib.Path(shutil.copytree(stopped, tmp_path / "run"))


def said(capsys) -> list[str]:
  return [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]


def steps_of(folder: pathlib.Path) -> list[int]:
  return [line["step"] for line in read_jsonl(folder / "metrics.jsonl")]


@pytest.mark.parametrize("how", ["removed", "emptied", "and a damaged checkpoint"])
def test_another_configuration_is_refused_without_config_json(how, dataset, left):
  if how == "emptied":
    (left / "config.json").write_bytes(b"")
  else:
    (left / "config.json").unlink()
  if how == "and a damaged checkpoint":
    (left / "checkpoints/4/extra/metadata").write_text("{}x")
  before = (left / "metrics.jsonl").read_text()
  line = r"run: holds a run with another configuration \(learning_rate was 0.003, now 0.5\)"
  with pytest.raises(InputError, match=line):
    Run(tiny.change(CONFIG, learning_rate=0.5), dataset, left).train()
  assert (left / "metrics.jsonl").read_text() == before
  free = tiny.change(CONFIG, log_every=3, checkpoint_minutes=1.0)
  assert Run(free, dataset, left, label="arm").train()["num_steps"] == 6


@pytest.mark.parametrize(
  ("part", "field", "value"), [("optimizer", "learning_rate", 0.5), ("train", "seed", 1)]
)
def test_a_checkpoint_of_another_run_is_refused_whatever_config_json_says(part, field, value, dataset, left):
  """As where the file was edited, or checkpoints of another seed were put there."""
  values = json.loads((left / "config.json").read_text())
  was = values[part][field]
  values[part][field] = value
  (left / "config.json").write_text(json.dumps(values))
  differs = rf"\({field} was {was}, now {value}\)"
  with pytest.raises(InputError, match=rf"run: step 4 is of a run with another configuration {differs}"):
    Run(tiny.change(CONFIG, **{field: value}), dataset, left).train()
  with pytest.raises(InputError, match=rf"config.json is not that of the run which saved step 4 {differs}"):
    Run.load(left)


def test_a_model_of_a_run_that_did_not_end_is_said_and_averaged_with_no_other(dataset, left, capsys):
  Run.load(left)
  line = f"{left}: is not finished (step 4 of 6); the command that trains it continues it"
  assert said(capsys) == [f"note: {line}"]
  with pytest.raises(InputError, match=re.escape(line.replace("/run:", "/0:"))):
    models_of(str(left.rename(left.parent / "0").parent / "{seed}"), 2)
  left = left.parent / "0"
  write_result(left / "result.json", diverged_result(Run(CONFIG, dataset, left, label="arm"), "nan"))
  Run.load(left)
  assert said(capsys) == [f"note: {left}: diverged, and its newest checkpoint is of step 4, before that"]


def test_a_run_does_not_continue_with_another_teacher(dataset, tmp_path):
  teacher, other, run = tmp_path / "teacher", tmp_path / "other", tmp_path / "run"
  for seed, folder in enumerate((teacher, other)):
    save_model(folder, make_model(resolve_config(CONFIG), tiny.VOCAB, seed=seed), CONFIG)
  config = tiny.change(CONFIG, objective=f"distil:teacher={teacher}", num_steps=3, checkpoint_every=1)
  with pytest.raises(KeyboardInterrupt):
    Run(config, dataset, run, tiny.StopsAt(2)).train()

  def in_its_place(old, new):
    teacher.rename(old)
    new.rename(teacher)
    objectives._teacher.cache_clear()  # as in another process
    objectives._digest_of_teacher.cache_clear()

  in_its_place(tmp_path / "first", other)
  with pytest.raises(InputError, match=r"run: holds a run with another teacher \(digest \w+, now \w+\)"):
    Run(config, dataset, run).train()
  assert steps_of(run) == [1, 2]  # as it was left
  in_its_place(other, tmp_path / "first")
  assert Run(config, dataset, run).train()["num_steps"] == 3
  # Nor are seeds of two teachers in one comparison, which reads what a finished run had.
  arms, folder = {"taught": {}}, tmp_path / "comparison"
  (first,) = Comparison(arms, [0], config, folder).run()
  assert first["teacher"] == json.loads((run / "result.json").read_text())["teacher"]
  in_its_place(tmp_path / "first", other)
  with pytest.raises(InputError, match=r"seed_0: holds a run with another teacher"):
    Comparison(arms, [0, 1], config, folder).run()
  teacher.rename(tmp_path / "gone")
  objectives._teacher.cache_clear()
  objectives._digest_of_teacher.cache_clear()
  assert Comparison(arms, [0], config, folder).run() == [first]  # which needs no teacher


def test_a_checkpoint_of_a_version_that_kept_less_is_refused(dataset, left, monkeypatch):
  restore = Checkpoints.restore

  def older(self, *args, **kwargs):
    state, extra = restore(self, *args, **kwargs)
    return state, {name: value for name, value in extra.items() if name not in ("config", "lines")}

  monkeypatch.setattr(Checkpoints, "restore", older)
  with pytest.raises(
    InputError, match=r"step 4 was saved by another version of moe_jax; continue with that one"
  ):
    Run(CONFIG, dataset, left).train()


def cut(path: pathlib.Path) -> None:
  path.write_text(path.read_text().splitlines(keepends=True)[0] + '{"step": 2, "lo')


LOSSES = {
  "emptied": (lambda path: path.write_bytes(b""), []),
  "removed": (pathlib.Path.unlink, []),
  "cut": (cut, [1]),
  "not utf-8": (lambda path: path.write_bytes(path.read_bytes().replace(b'{"step": 2', b"\xff")), [1, 3, 4]),
}


@pytest.mark.parametrize(("lose", "rest"), LOSSES.values(), ids=LOSSES)
def test_lost_lines_of_metrics_are_counted(lose, rest, dataset, left, capsys):
  lose(left / "metrics.jsonl")
  capsys.readouterr()
  for _ in range(2):  # the hole stays, and so does the note
    with pytest.raises(KeyboardInterrupt):
      Run(CONFIG, dataset, left, tiny.StopsAt(5), label="arm").train()
    (note,) = said(capsys)
    assert f"metrics.jsonl: {len(rest)} of 4 lines up to step 4 are there" in note
  assert steps_of(left) == [*rest, 5]
  moved = sorted(path.name for path in left.glob("damaged/*"))
  assert moved == (["metrics.jsonl-1"] if rest else [])  # nothing that cannot be read is deleted
  result = Run(CONFIG, dataset, left, label="arm").train()
  assert result["metric_lines"] == 6 and steps_of(left) == [*rest, 5, 6]


def test_all_lines_are_there_where_nothing_was_lost(dataset, left, capsys):
  assert Run(CONFIG, dataset, left, label="arm").train()["metric_lines"] == 6
  assert said(capsys) == [] and steps_of(left) == [1, 2, 3, 4, 5, 6]


def test_a_run_without_its_checkpoints_says_that_it_begins_anew(dataset, left, capsys):
  shutil.rmtree(left / "checkpoints")
  before = (left / "metrics.jsonl").read_text()
  with pytest.raises(KeyboardInterrupt):
    Run(CONFIG, dataset, left, tiny.StopsAt(1), label="arm").train()
  (note,) = said(capsys)
  assert "has no checkpoint, so the run begins anew, although metrics.jsonl says step 5" in note
  assert (left / "damaged/metrics.jsonl-1").read_text() == before and steps_of(left) == [1]
  (left / "metrics.jsonl").unlink()
  (left / "damaged/4-1").mkdir()
  write_result(left / "result.json", {"arm": "arm", "seed": 0, "num_steps": 6, "validation": {"nll": 1.0}})
  with pytest.raises(KeyboardInterrupt):
    Run(CONFIG, dataset, left, tiny.StopsAt(1), label="arm").train()
  (note,) = said(capsys)
  assert note.endswith("begins anew, although result.json says step 6, damaged/ says step 4")


@pytest.fixture(scope="module")
def extended(dataset, tmp_path_factory):
  """(finished, extended): the folder of a finished run with checkpoints of steps 4 and 6, and that folder after the same
  run with more steps was stopped at its first, before it saved anything."""
  finished = tmp_path_factory.mktemp("extensible") / "run"
  Run(EXTENSIBLE, dataset, finished, label="arm").train()
  extended = pathlib.Path(shutil.copytree(finished, finished.with_name("extended")))
  with pytest.raises(KeyboardInterrupt):
    Run(LONGER, dataset, extended, tiny.StopsAt(7), label="arm").train()
  return finished, extended


def test_a_stopped_extension_is_not_finished_and_keeps_the_result_of_the_shorter_run(
  extended, dataset, tmp_path
):
  finished, folder = extended[0], pathlib.Path(shutil.copytree(extended[1], tmp_path / "run"))
  config = lambda path: json.loads((path / "config.json").read_text())["train"]["num_steps"]
  result = (finished / "result.json").read_text()
  assert (config(finished), config(folder), (folder / "result.json").read_text()) == (6, 7, result)
  assert is_shorter(finished, LONGER) and not is_shorter(finished, EXTENSIBLE)
  assert is_shorter(folder, LONGER)
  assert Run(LONGER, dataset, folder, label="arm").train()["num_steps"] == 7
  assert not is_shorter(folder, LONGER)


def test_a_run_that_its_stop_ended_is_finished(tmp_path):
  result = {"arm": "arm", "seed": 0, "num_steps": 4, "validation": {"nll": 1.0}}
  write_result(tmp_path / "result.json", result | {"config": EXTENSIBLE.to_dict()})
  assert not is_shorter(tmp_path, EXTENSIBLE) and is_shorter(tmp_path, LONGER)
  write_result(tmp_path / "result.json", result | {"config": {"train": "wrong"}})  # of another program
  assert not is_shorter(tmp_path, LONGER)


def test_a_finished_run_without_its_last_step_is_not_taken_for_an_earlier_one(extended, dataset, tmp_path):
  """As a start of other runs, either. One whose extension is under way is at whatever step it has."""
  folders = [pathlib.Path(shutil.copytree(f, tmp_path / f.name)) for f in extended]
  assert [Run.load(folder).step for folder in folders] == [6, 6]
  for folder in folders:
    (folder / "checkpoints/6/extra/metadata").write_text("{}x")
  line = r"run: the result is of step 6, and the newest whole checkpoint of step 4; remove result.json: "
  for use in (
    lambda: Run.load(folders[0]),
    lambda: Run(tiny.change(EXTENSIBLE, init_from=str(folders[0])), dataset, tmp_path / "other").train(),
    lambda: evaluate_as(Run(EXTENSIBLE, dataset, folders[0]), {"same": EXTENSIBLE}),
  ):
    with pytest.raises(InputError, match=line) as error:
      use()
    assert "\n" not in str(error.value)
  assert Run.load(folders[1]).step == 4
  (folders[0] / "result.json").unlink()
  assert Run.load(folders[0]).step == 4


def test_a_damaged_checkpoint_that_cannot_be_moved_ends_the_run(dataset, left):
  (left / "damaged").write_text("a file")
  (left / "checkpoints/4/extra/metadata").write_text("{}x")
  with pytest.raises(
    InputError,
    match=r"checkpoints/4: is damaged, and cannot be moved to .*damaged which is no folder; move it away",
  ):
    Run(CONFIG, dataset, left).train()
  assert sorted(os.listdir(left / "checkpoints")) == ["2", "4"]


@pytest.mark.parametrize("name", ["config.json", "result.json", "metrics.jsonl"])
def test_a_damaged_file_that_cannot_be_moved_ends_the_run_and_is_not_written_over(name, dataset, left):
  (left / "damaged").write_text("a file")
  (left / name).write_text('{"arm\n')
  before = {path: path.read_bytes() for path in left.rglob("*") if path.is_file() and path.name != locks.LOCK}
  line = rf"^{left / name}: is damaged, and cannot be moved to .*damaged which is no folder; move it away$"
  for _ in range(2):
    with pytest.raises(InputError, match=line):
      Run(CONFIG, dataset, left).train()
  assert before == {path: path.read_bytes() for path in before}


def test_only_who_moves_damaged_checkpoints_says_that_the_run_begins_anew(left):
  for step in (2, 4):
    (left / f"checkpoints/{step}/extra/metadata").write_text("{}x")
  with pytest.raises(InputError, match=r"no checkpoint is whole: .*\); restore the folder from a copy$"):
    Run.load(left)
  assert sorted(os.listdir(left / "checkpoints")) == ["2", "4"]


class Signalled(tiny.StopsAt):
  def update(self, step, *numbers):
    if step == self.step:
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(0.2)


@pytest.mark.parametrize("step", [0, 2], ids=["alone", "before SIGTERM"])
def test_a_save_that_fails_is_noticed_at_the_next_step_which_is_saved(step, dataset, tmp_path, monkeypatch):
  write, save, steps = OrbaxWriter.write, Checkpoints.save, []

  def full(self, step, *args):
    steps.append(step)
    if step == 2:
      raise OSError(errno.ENOSPC, "No space left on device")
    write(self, step, *args)

  def until_failed(self, step, *args, **more):
    save(self, step, *args, **more)
    deadline = time.monotonic() + 20
    while step == 2 and not self.has_failed and time.monotonic() < deadline:
      time.sleep(0.01)

  monkeypatch.setattr(idle_saver, "AVAILABLE", False)
  monkeypatch.setattr(OrbaxWriter, "write", full)
  monkeypatch.setattr(Checkpoints, "save", until_failed)
  line = rf"^arm: {tmp_path}/run: no space left to write .*; make room, and the same command continues from step 3$"
  with pytest.raises(InputError, match=line):
    Run(CONFIG, dataset, tmp_path / "run", Signalled(step), label="arm").train()
  assert steps == [2, 3] and os.listdir(tmp_path / "run/checkpoints") == ["3"]


def test_a_save_that_fails_with_none_before_it_says_that_the_run_begins_anew(dataset, tmp_path, monkeypatch):
  def full(*args):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(idle_saver, "AVAILABLE", False)
  monkeypatch.setattr(OrbaxWriter, "write", full)
  with pytest.raises(
    InputError, match=r"make room, and the same command begins anew \(there is no checkpoint\)"
  ):
    Run(CONFIG, dataset, tmp_path, label="arm").train()


@pytest.mark.parametrize("part", ["params", "opt_state"])
def test_an_update_that_only_the_last_step_spoils_is_not_saved(part, dataset, tmp_path, monkeypatch):
  """Its loss and its gradient are of the state before it."""

  def spoilt(*args):
    steps = compile_steps(*args)

    def train(state, batch):
      state, metrics = steps.train(state, batch)
      if int(state.step) == CONFIG.train.num_steps:
        floats = lambda x: x * jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else x
        state = state._replace(**{part: jax.tree.map(floats, getattr(state, part))})
      return state, metrics

    return steps._replace(train=train)

  monkeypatch.setattr(loop, "compile_steps", spoilt)
  name = {"params": "parameters", "opt_state": "optimizer"}[part]
  with pytest.raises(InputError, match=rf"has {name} nan at step 7; the checkpoint of step 4 in .* is good"):
    Run(CONFIG, dataset, tmp_path).train()
  assert (
    sorted(os.listdir(tmp_path / "checkpoints")) == ["2", "4"] and not (tmp_path / "result.json").exists()
  )


def test_one_number_that_is_not_finite_is_found():
  good = {"w": jnp.ones((3, 2), jnp.bfloat16), "n": jnp.int32(3), "key": jax.random.key(0)}
  assert with_bad_numbers({"good": good}) == []
  for bad in (jnp.nan, jnp.inf, -jnp.inf):
    for kind in (jnp.float32, jnp.bfloat16):
      spoilt = good | {"b": jnp.zeros((2, 2), kind).at[1, 1].set(bad)}
      assert with_bad_numbers({"good": good, "spoilt": spoilt}) == ["spoilt"]
