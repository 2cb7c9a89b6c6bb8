"""The folder of a comparison with damaged files, diverged arms, other flags, and several commands at a time."""

import csv
import io
import json
import pathlib
import shutil

import pytest
from rich.console import Console

from moe_jax import disk, locks
from moe_jax.comparison.comparison import Comparison
from moe_jax.comparison.folder import ComparisonFolder
from moe_jax.comparison.reporting import joined_commands
from moe_jax.comparison.results import load_results
from moe_jax.config import MeshConfig
from moe_jax.errors import InputError, of_the_system
from moe_jax.ops import metrics
from moe_jax.training.loop import Run
from moe_jax.training.metric_writer import read_jsonl
from moe_jax.training.progress import TrainingProgress
from moe_jax.training.result_file import read_result, write_result
from tests import tiny

CONFIG = tiny.change(
  tiny.CONFIG,
  num_steps=4,
  tail_fraction=0.8,
  eval_batches=2,
  num_layers=1,
  schedule="constant",
  warmup_steps=1,
  balancers="none",
)
ARMS = {"a": {"jitter": 0.1}, "b": {"jitter": 0.2}}
TEXTS = {"title": "t", "question": "q", "command": "c"}


def compare(folder, arms=ARMS, config=CONFIG, **texts):
  comparison = Comparison(arms, [0], config, folder)
  results = comparison.run()
  comparison.report(results, **TEXTS | texts)
  return results


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """(folder, results)."""
  folder = tmp_path_factory.mktemp("comparison") / "run"
  return folder, compare(folder)


@pytest.fixture
def copy(finished, tmp_path):
  return pathlib.Path(shutil.copytree(finished[0], tmp_path / "run"))


@pytest.fixture
def trained(monkeypatch):
  """The labels of the runs that are trained."""
  labels, train = [], Run.train
  monkeypatch.setattr(Run, "train", lambda self: (labels.append(self.label), train(self))[1])
  return labels


def test_no_metric_of_a_user_can_have_a_name_that_runs_write(finished):
  folder, results = finished
  lines = read_jsonl(folder / "metrics.jsonl")
  written = {name.removeprefix("eval_") for line in lines for name in line} | set(results[0]["validation"])
  for name in written:
    with pytest.raises(InputError, match=f"metric '{name}': the name is taken by moe_jax"):
      metrics.register(name, metrics.Metric(max, max))


def test_damaged_json_files_are_made_again(finished, copy, trained, capsys):
  """The result from the last checkpoint, config.json from the flags. What was damaged is kept."""
  config = copy / "config.json"
  before = json.loads(config.read_text())
  flipped = (copy / "arms/b/seed_0/result.json").read_text().replace('"nll": ', '"nll": 1').encode()
  damaged = {
    config: b"null",
    copy / "arms/a/seed_0/config.json": b"",
    copy / "arms/a/seed_0/result.json": b'{"arm": "a", "se',
    copy / "arms/b/seed_0/result.json": flipped,
  }
  for path, content in damaged.items():
    path.write_bytes(content)
  again = compare(copy)
  assert trained == ["a", "b"]  # which restore their last steps, and evaluate
  assert [r["validation"] for r in again] == [r["validation"] for r in finished[1]]
  assert json.loads(config.read_text()) == before
  for path, content in damaged.items():
    assert (path.parent / f"damaged/{path.name}-1").read_bytes() == content
  assert capsys.readouterr().err.count("note: ") == len(damaged)


def test_a_report_names_all_commands_that_its_results_come_from(copy, trained):
  commands = lambda: json.loads((copy / "about.json").read_text())["command"]
  compare(copy, {"a": ARMS["a"]}, command="d")  # b is of "c"
  assert commands() == "c; d" and json.loads((copy / "report.json").read_text())["commands"] == ["c", "d"]
  compare(copy, {"b": ARMS["b"]}, command="d")
  assert commands() == "c; d"
  compare(copy, command="e")
  assert commands() == "e"
  (copy / "report.json").write_text('{"commands": 1}')
  compare(copy, {"a": ARMS["a"]}, command="d")
  assert commands() == "d" and trained == []


def test_a_report_keeps_what_earlier_commands_say_of_their_arms(copy):
  """Also one of before, which lacks `states`. What a field is comes from config.json."""
  of = lambda name: {"notes": [f"of {name}", "of both"], "states": ["jitter"]}
  texts = lambda: json.loads((copy / "report.json").read_text())
  of_results = [
    "Nothing is dropped (--dispatcher=dropless), so ...",
    "This is a tour: 100 steps are too few ...",
  ]
  of_results += ["Loss minus that of training and evaluation at 1.25, nats per token, beside ST-MoE's ..."]
  stored = texts() | {"notes": ["of before", *of_results], "varies": ["slots"]}
  stored.pop("states")
  (copy / "report.json").write_text(json.dumps(stored))
  compare(copy, {"b": ARMS["b"]}, varies=["objective"], **of("b"))
  compare(copy, {"a": ARMS["a"]}, **of("a"))
  assert texts()["notes"] == ["of before", "of b", "of both", "of a"]
  assert (texts()["varies"], texts()["states"]) == (["slots", "objective"], ["jitter"])
  assert json.loads((copy / "about.json").read_text())["varies"] == []  # the arms do not differ in them
  assert "Arms have jitter=0.1, except that b has 0.2." in (copy / "report.html").read_text()
  compare(copy, notes=["of all"])  # which has all results
  assert (texts()["notes"], texts()["varies"], texts()["states"]) == (["of all"], [], [])


def test_a_command_stands_for_its_shards():
  shards = ["x --n=1 --shard=1/2", "x --shard 2/2 --n=1", "y -shard=1/2", "don't"]
  assert joined_commands([shards[:2], shards[1:]]) == shards
  assert joined_commands([shards, ["x --n=1"]]) == [*shards[2:], "x --n=1"]


def test_results_with_another_digit_or_wrong_types_are_damaged(finished, tmp_path):
  path, whole = tmp_path / "result.json", json.loads((finished[0] / "arms/a/seed_0/result.json").read_text())
  wrong = [("validation", None), ("validation", {}), ("fingerprint", 5), ("columns", None), ("columns", [{}])]
  wrong += [
    ("num_steps", "x"),
    ("arm", ["x"]),
    ("seed", "x"),
    ("evaluations", [1]),
    ("training", {"loss": {}}),
  ]
  disk.write_json(path, whole)
  result = read_result(path)
  assert result == finished[1][0]
  for name, value in wrong:
    disk.write_json(path, whole | {name: value})
    assert read_result(path) == {}, name
    disk.write_json(path, result | {name: value})  # without a digest
    assert read_result(path) == {}, name
  disk.write_json(path, whole | {"num_steps": 5})
  assert read_result(path) == {}
  disk.write_json(path, result | {"num_steps": 5})  # as other programs write it
  assert read_result(path)["num_steps"] == 5


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"null", b"[1]", b"\xff\0", b"[" * 100_000])
def test_files_without_a_json_object_are_damaged(tmp_path, content):
  (tmp_path / "x").write_bytes(content)
  assert disk.read_object(tmp_path / "x") is None
  disk.write_json(tmp_path / "x", {"a": 1})
  assert disk.read_object(tmp_path / "x") == {"a": 1}


def test_names_are_shown_as_they_are():
  """Square brackets are markup for rich, which drops them or fails."""
  for terminal in (False, True):
    out = io.StringIO()
    with TrainingProgress(2, Console(file=out, force_terminal=terminal, width=200)) as progress:
      progress.start_run("[/red] [b]x", 2)
      progress.update(2, 1.0, 0.5, 10.0)
      progress.note("data in [/red] [b]y")
      progress.finish_run()
    assert "[/red] [b]x" in out.getvalue() and "[/red] [b]y" in out.getvalue()


def test_a_full_disk_leaves_the_file_that_was_there(tmp_path, monkeypatch):
  disk.write_json(tmp_path / "x", {"a": 1})

  def full(handle):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(disk.os, "fsync", full)
  with pytest.raises(OSError, match="No space") as found:
    disk.write_json(tmp_path / "x", {"a": 2})
  assert str(of_the_system(found.value)).startswith(f"{tmp_path / 'x'}: no space left to write")
  assert disk.read_object(tmp_path / "x") == {"a": 1} and len(list(tmp_path.iterdir())) == 1


def test_a_target_that_is_a_folder_is_named(tmp_path):
  (tmp_path / "report.html").mkdir()
  with pytest.raises(IsADirectoryError) as found:
    disk.write_text(tmp_path / "report.html", "x")
  assert str(of_the_system(found.value)) == f"{tmp_path / 'report.html'}: Is a directory"


def test_runs_of_another_configuration_are_noticed_without_the_config_of_the_folder(copy):
  (copy / "config.json").write_text("")
  with pytest.raises(InputError, match=r"seed_0: holds a run with another configuration \(learning_rate was"):
    compare(copy, config=tiny.change(CONFIG, learning_rate=1e-4))


@pytest.mark.parametrize(
  "lose", [lambda path: path.write_text(""), pathlib.Path.unlink], ids=["emptied", "removed"]
)
def test_finished_runs_of_another_configuration_are_noticed_without_any_config(copy, trained, lose):
  """Their results say so, and their checkpoints."""
  for path in (copy / "config.json", copy / "arms/a/seed_0/config.json", copy / "arms/b/seed_0/config.json"):
    lose(path)
  (copy / "config.json").write_text("")  # without one, the folder is refused
  (copy / "arms/b/seed_0/result.json").unlink()
  line = r"seed_0: holds a run with another configuration \(learning_rate was 0.003, now 0.5\)"
  with pytest.raises(InputError, match="a/" + line):
    compare(copy, config=tiny.change(CONFIG, learning_rate=0.5))
  shutil.rmtree(copy / "arms/a/seed_0/checkpoints")
  with pytest.raises(InputError, match="a/" + line):
    compare(copy, config=tiny.change(CONFIG, learning_rate=0.5))
  with pytest.raises(InputError, match="b/" + line):
    compare(copy, {"b": ARMS["b"]}, tiny.change(CONFIG, learning_rate=0.5))
  compare(copy, {"a": ARMS["a"]})  # nothing has claimed the folder meanwhile
  assert trained == []


def test_without_config_json_the_arms_of_other_commands_are_named_too(copy, trained):
  """Nothing else says that all arms of a table have one configuration in common."""
  (copy / "config.json").unlink()
  with pytest.raises(
    InputError, match=r"config.json is lost, so nothing says how \S*arms/b/seed_0 is configured"
  ):
    compare(copy, {"a": ARMS["a"]})
  with pytest.raises(InputError, match=r"b/seed_0: holds a run with another .*\(jitter was 0.2, now 0.3\)"):
    compare(copy, ARMS | {"b": {"jitter": 0.3}})
  assert len(compare(copy)) == 2 and trained == []


def test_two_arms_do_not_share_a_folder(tmp_path):
  with pytest.raises(InputError, match=r"arms 'bias>0' and 'bias<0': both would be in .*arms/bias_0; use"):
    Comparison({"bias>0": {}, "bias<0": {"jitter": 0.9}}, [0], CONFIG, tmp_path / "run")


def test_damaged_metrics_leave_no_silent_hole(copy, capsys):
  paths = [copy / f"arms/{arm}/seed_0/metrics.jsonl" for arm in "ab"]
  paths[0].write_text("{damaged}\n" + paths[0].read_text()[:-30])
  paths[1].write_text("")
  compare(copy)
  assert [(x["arm"], x["step"]) for x in read_jsonl(copy / "metrics.jsonl")] == [("a", 1), ("a", 2), ("a", 3)]
  said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
  assert [line.partition("; ")[2] for line in said] == [
    "3 of 4 lines are there, up to step 3 of 4, and 1 cannot be read",
    "0 of 4 lines are there, up to step 0 of 4, and 0 cannot be read",
  ]
  paths[0].write_text("".join(f'{{"step": {step}}}\n' for step in (1, 2, 4)))  # a hole before the end
  compare(copy)
  assert "jsonl: is damaged; 3 of 4 lines are there, up to step 4 of 4" in capsys.readouterr().err


def test_a_claim_that_is_gone_is_written_again(tmp_path, capsys):
  """Where runs are. A folder of other things is refused as before."""
  folder, claim = ComparisonFolder(tmp_path), {"arms": {"a": {}}, "seeds": [0], "config": CONFIG.to_dict()}
  (tmp_path / "arms").mkdir()
  with pytest.raises(InputError, match="is not empty and holds no run"):
    folder.check(claim)
  (tmp_path / "arms/a/seed_0").mkdir(parents=True)
  folder.check(claim)
  said = capsys.readouterr().err
  assert (
    said.startswith(f"note: {tmp_path}/config.json: is missing; it is written again")
    and said.count("\n") == 1
  )


def test_a_claim_that_another_command_has_just_mended_is_not_moved(tmp_path, monkeypatch):
  """This one finds it damaged. Before it acts, the other one moves it aside and writes its own."""
  folder, claim = ComparisonFolder(tmp_path), {"arms": {"a": {}}, "seeds": [0], "config": CONFIG.to_dict()}
  path, read, move_aside, found = tmp_path / "config.json", disk.read_object, disk.move_aside, []
  path.write_text("{")

  def read_before_the_other_acts(of):
    value = read(of)
    if not found:
      found.append(value)
      move_aside(path, tmp_path)
      disk.write_json(path, claim)
    return value

  with monkeypatch.context() as patched:
    patched.setattr(disk, "read_object", read_before_the_other_acts)
    folder.check(claim)
  assert found == [None] and read(path) == claim
  assert [p.name for p in (tmp_path / disk.ASIDE).iterdir()] == ["config.json-1"]
  # Where it still is damaged, nobody can write it meanwhile.
  path.write_text("{")
  held = lambda: (tmp_path / locks.LOCK).absolute() in locks._held
  monkeypatch.setattr(disk, "move_aside", lambda *of: (found.append(held()), move_aside(*of))[1])
  folder.check(claim)
  assert found == [None, True] and not path.exists()


def test_a_diverged_arm_is_kept_and_the_others_go_on(tmp_path, trained, capsys):
  arms = {"a": {"jitter": 0.1}, "wild": {"learning_rate": 1e30, "clip_norm": 0.0}, "b": {"jitter": 0.2}}
  for _ in range(2):  # also when it is started again
    results = compare(tmp_path / "run", arms)
    assert trained == ["a", "wild", "b"]
  assert [r["arm"] for r in results] == ["a", "wild", "b"]
  assert "wild seed 0 has " in results[1]["diverged"] and results[1]["validation"]["nll"] == "Infinity"
  out = capsys.readouterr().out
  assert "the arm is kept as diverged" in out and "Diverged: wild seed 0 (" in out


def test_flags_that_change_no_run_may_change(finished, copy, trained):
  """How often it saves and logs, and over which devices it is spread."""
  free = {
    "checkpoint_every": 1,
    "log_every": 3,
    "tensorboard": True,
    "checkpoint_minutes": 0.0,
    "max_minutes": 60.0,
  }
  again = compare(copy, config=tiny.change(CONFIG, **free, mesh=MeshConfig(data=2)))
  assert trained == [] and again == finished[1]


def test_a_constant_schedule_may_be_extended(finished, copy, trained, tmp_path):
  """It continues from the last step, and ends as a run that had so many from the start on."""
  longer = tiny.change(CONFIG, num_steps=6)
  extended, whole = compare(copy, config=longer), compare(tmp_path / "whole", config=longer)
  assert trained == ["a", "b", "a", "b"]
  assert [r["validation"] for r in extended] == [r["validation"] for r in whole]
  for name in ("loss", "max_vio", "tail_steps"):
    assert [r["training"][name] for r in extended] == [r["training"][name] for r in whole]
  assert extended[0]["num_steps"] == 6
  with pytest.raises(InputError, match=r"\(num_steps was 6, now 4\)"):
    compare(copy)
  with pytest.raises(InputError, match=r"\(schedule was 'constant', now 'cosine'; num_steps was 6, now 8\)"):
    compare(copy, config=tiny.change(longer, num_steps=8, schedule="cosine"))


def test_commands_in_one_folder_have_their_runs_and_all_are_merged(finished, tmp_path, monkeypatch):
  """While one has arm a, another may train b, but not a."""
  folder, train, seen = tmp_path / "run", Run.train, []

  def other_command(self):
    held, locks._held = locks._held, {}  # what a process of its own does not hold
    try:
      with pytest.raises(InputError, match=r"run a seed 0 in .*run: in use by process \d+ on .* since"):
        compare(folder)
      seen.append(compare(folder, {"b": ARMS["b"]}))
    finally:
      locks._held = held

  def started(self):
    if self.label == "a":
      monkeypatch.setattr(Run, "train", train)
      other_command(self)
    return train(self)

  monkeypatch.setattr(Run, "train", started)
  compare(folder, {"a": ARMS["a"]})
  assert [r["arm"] for r in seen[0]] == ["b"]
  by_arm = {r["arm"]: r["validation"] for r in load_results(folder)}
  assert by_arm == {r["arm"]: r["validation"] for r in finished[1]}
  assert {line["arm"] for line in read_jsonl(folder / "metrics.jsonl")} == {"a", "b"}
  assert set(json.loads((folder / "config.json").read_text())["arms"]) == {"a", "b"}


def test_a_report_keeps_what_results_have_besides_those_that_are_stored(copy, tmp_path):
  """A quantity that an experiment adds after training, where an earlier command has trained more arms."""
  disk.write_json(copy / "config.json", json.loads((copy / "config.json").read_text()) | {"seeds": [0, 1]})
  later = copy / "arms/b/seed_1"
  result = read_result(copy / "arms/b/seed_0/result.json")
  write_result(later / "result.json", result | {"seed": 1, "metric_lines": 0, "num_steps": 0})
  comparison = Comparison(ARMS, [0], CONFIG, copy)
  gain = {"key": "gain", "title": "Gain", "part": "kept", "name": "gain", "unit": "", "format": ".1f"}
  gain |= {"lower_is_better": False, "of_experts": False}
  results = [r | {"kept": {"gain": 7.0}, "columns": [*r["columns"], gain]} for r in comparison.run()]
  comparison.report(results, **TEXTS)
  lines = {line["arm"]: line for line in csv.DictReader((copy / "summary.csv").open())}
  assert [float(lines[arm]["gain_mean"]) for arm in "ab"] == [7.0, 7.0]
  assert lines["b"]["seeds"].split() == ["0", "1"]
