"""Speedruns on a tiny text: pairs in turn, the stop at the target, what is kept, and the table of the leaderboard."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from moe_jax import disk, locks
from moe_jax.analysis import speedrun
from moe_jax.analysis.leaderboard import ARMS, MEASURED, read_entries, row, score, table
from moe_jax.analysis.speedrun import Rules, Speedrun
from moe_jax.config import BlockConfig, Config, MeshConfig, ModelConfig, MoEConfig, Segment
from moe_jax.errors import InputError, Stopped
from moe_jax.nn.build import resolve
from moe_jax.training.progress import TrainingProgress
from tests import tiny
from tests.data.helpers import write_files
from tests.scripts import ROOT, assert_one_line, run_scripts

RULES = Rules(target_bits_per_byte=7.0, max_active_params=20_000, max_vio=7.0, evaluate_bytes=400)
ABOUT = {"name": "quick start", "commit": "c" * 40}
MACHINE = {"cores": 2}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  files = {f"{d}/{i}.txt": f"{d} number {i} of these\n" * 20 for d in ("news", "code") for i in range(20)}
  return str(write_files(tmp_path_factory.mktemp("text") / "corpus", files))


@pytest.fixture(scope="module")
def reference(text):
  return tiny.change(
    tiny.CONFIG, dataset="text_folder", text_folder=text, num_layers=1, num_steps=12, balancers="none",
    dispatcher="dropless", jitter=0.0, warmup_steps=2, learning_rate=0.03,
  )  # fmt: skip


def _slower(config: Config) -> Config:
  return tiny.change(config, learning_rate=0.01)


QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def finished(reference, tmp_path_factory):
  """(folder, entry) of two seeds."""
  folder = tmp_path_factory.mktemp("speedrun") / "run"
  return folder, Speedrun(_slower(reference), reference, RULES, folder, ABOUT, MACHINE).run([0, 1], QUIET)


def test_runs_end_at_the_first_evaluation_that_meets_the_target(finished):
  """Every three steps: 8 x 16 tokens of one byte, against 400 bytes."""
  folder, entry = finished
  for pair in entry["seeds"]:
    assert pair["reference"]["num_steps"] <= pair["attempt"]["num_steps"] < 12
    for arm in ARMS:
      lines = (folder / f"seed_{pair['seed']}" / arm / "metrics.jsonl").read_text().splitlines()
      lines = [line for line in map(json.loads, lines) if "eval_bits_per_byte" in line]
      assert [line["step"] for line in lines] == list(range(3, pair[arm]["num_steps"] + 1, 3))
      assert [line["eval_bits_per_byte"] <= 7.0 for line in lines] == [False] * (len(lines) - 1) + [True]
      assert pair[arm]["bits_per_byte"] == lines[-1]["eval_bits_per_byte"] and pair[arm]["reached"]
      assert pair[arm]["tokens"] == pair[arm]["bytes"] == pair[arm]["num_steps"] * 128
      result = json.loads((folder / f"seed_{pair['seed']}" / arm / "result.json").read_text())
      timed = result["training"]["seconds"] / (pair[arm]["num_steps"] - 1)  # all but the first step
      assert pair[arm]["seconds"] == pytest.approx(timed * pair[arm]["num_steps"])
  assert entry["score"]["tokens"][0] > 1.2 and entry["rules"]["max_vio"] == 7.0


def test_a_seed_with_one_finished_run_starts_over_and_others_are_kept(finished, reference, monkeypatch):
  folder, entry = finished
  (folder / "seed_1" / "attempt" / "result.json").unlink()
  trained, train = [], speedrun.Run.train
  monkeypatch.setattr(
    speedrun.Run, "train", lambda self: (trained.append((self.label, self.config.train.seed)), train(self))[1]
  )
  again = Speedrun(_slower(reference), reference, RULES, folder, ABOUT, MACHINE).run([0, 1, 2], QUIET)
  assert trained == [(arm, seed) for seed in (1, 2) for arm in ("reference", "attempt")]
  assert again["seeds"][0] == entry["seeds"][0]
  for arm in ARMS:
    assert again["seeds"][1][arm]["bits_per_byte"] == entry["seeds"][1][arm]["bits_per_byte"]


def test_a_damaged_result_does_not_start_the_pair_over(finished, reference, monkeypatch, capsys):
  """It is made again from its checkpoint, with the seconds that were measured."""
  folder, _ = finished
  speed = Speedrun(_slower(reference), reference, RULES, folder, ABOUT, MACHINE)
  before, (path, other) = (
    speed.run([0], QUIET)["seeds"],
    (folder / f"seed_0/{arm}/result.json" for arm in ARMS),
  )
  path.write_text(path.read_text()[:-9])
  kept = other.read_bytes()
  steps = []
  monkeypatch.setattr(TrainingProgress, "update", lambda self, step, *numbers: steps.append(step))
  again = speed.run([0], QUIET)["seeds"]
  timed = lambda pairs: [{arm: pairs[0][arm] | {"compile_seconds": 0} for arm in ARMS}]
  assert timed(again) == timed(before) and steps == []
  assert other.read_bytes() == kept and "result.json: is damaged, moved to" in capsys.readouterr().err


def test_a_pair_that_starts_over_is_moved_aside_and_not_while_it_is_trained(
  finished, reference, tmp_path, monkeypatch
):
  """The other process has the lock of the run alone, or that of its pair."""
  speed = Speedrun(_slower(reference), reference, RULES, tmp_path / "run", ABOUT, MACHINE)
  arm = tmp_path / "run/seed_0/reference"
  arm.mkdir(parents=True)
  (arm / "checkpoints").write_text("precious")
  for lock in (arm / locks.LOCK, arm.parent / locks.LOCK):
    with locks.hold(lock, "it"), monkeypatch.context() as patch:
      patch.setattr(locks, "_held", {})  # what another process does not hold
      with pytest.raises(InputError, match=r"seed_?.0.*: in use by process"):
        speed.run([0], QUIET)
  assert (arm / "checkpoints").read_text() == "precious"

  def stopped(self):
    raise Stopped("step 4 of 12 is saved, and the same command continues from it")

  monkeypatch.setattr(speedrun.Run, "train", stopped)
  with pytest.raises(Stopped, match=r"^reference seed 0: stopped; .*the same command starts this one over"):
    speed.run([0], QUIET)
  assert (arm.parent / "damaged/reference-1/checkpoints").read_text() == "precious" and not arm.exists()


def test_an_attempt_that_misses_target_or_balance_has_no_score(reference, tmp_path):
  """Whether its loss or its MaxVio is too high, at the end of its steps."""
  for i, fields in enumerate([{"target_bits_per_byte": 0.1}, {"max_vio": -0.5}]):
    rules = dataclasses.replace(RULES, **fields)
    entry = Speedrun(_slower(reference), reference, rules, tmp_path / str(i), ABOUT, MACHINE).run(
      [0, 1], QUIET
    )
    assert entry["score"] is None
    assert [pair[arm]["num_steps"] for pair in entry["seeds"] for arm in ARMS] == [12] * 4
    assert "| no score |" in row(entry) and "| 0 of 2 (reference: 0 of 2) |" in row(entry)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"num_layers": 8}, r"--max_active_params=20000: the attempt has 2\d,\d+ active parameters"),
    (
      {"router": "expert_choice", "accept_leaks": "expert_choice"},
      "--accept_leaks=expert_choice: an attempt must not look",
    ),
    ({"objective": "masked_lm"}, "--objective=masked_lm: must be next_token"),
    ({"dataset": "markov"}, "--dataset=markov.*: has no bytes"),
    ({"init_from": "runs/x"}, "--init_from=runs/x: an attempt starts from nothing"),
    ({"objective": "distil:teacher=x"}, "--objective=distil:teacher=x: an attempt starts from nothing"),
    ({"num_steps": 1}, "--num_steps=1: must be 2 or more"),
  ],
)
def test_attempts_outside_the_rules_are_refused(reference, tmp_path, fields, message):
  with pytest.raises(InputError, match=message):
    Speedrun(tiny.change(reference, **fields), reference, RULES, tmp_path / "run", ABOUT, MACHINE)
  assert not (tmp_path / "run").exists()


def test_an_attempt_with_a_part_that_could_not_be_measured_is_refused(reference, tmp_path, monkeypatch):
  monkeypatch.setattr(speedrun, "sees_later_tokens", lambda config: None)
  with pytest.raises(InputError, match="a part could not be checked, see the note: an attempt must not look"):
    Speedrun(reference, reference, RULES, tmp_path / "run", ABOUT, MACHINE)


def test_a_folder_of_another_attempt_is_refused(finished, reference):
  folder, _ = finished
  with pytest.raises(InputError, match="holds runs with other attempt; choose"):
    Speedrun(reference, reference, RULES, folder, ABOUT, MACHINE)
  for fields in ({"num_steps": 13}, {"mesh": MeshConfig(data=2, expert=1)}):  # they change what is timed
    with pytest.raises(InputError, match="holds runs with other attempt; choose"):
      Speedrun(tiny.change(_slower(reference), **fields), reference, RULES, folder, ABOUT, MACHINE)


def test_finished_pairs_are_kept_under_flags_that_change_nothing_and_not_on_other_text(
  finished, reference, monkeypatch, tmp_path
):
  folder, entry = finished
  other = str(shutil.copytree(reference.data.text_folder, tmp_path / "text"))
  attempt = tiny.change(_slower(reference), log_every=5, max_minutes=9.0, text_folder=other)
  start = lambda: Speedrun(attempt, reference, RULES, folder, ABOUT, MACHINE)
  monkeypatch.setattr(speedrun.Run, "train", None)  # nothing is trained
  (pair,) = start().run([0], QUIET)["seeds"]
  assert all(pair[arm]["seconds"] == entry["seeds"][0][arm]["seconds"] for arm in ARMS)
  write_files(tmp_path / "text", {"news/3.txt": "other words\n" * 20})
  with pytest.raises(InputError, match="holds a run on other text"):
    start().run([0], QUIET)


def test_layers_that_cannot_be_out_of_balance_do_not_dilute_max_vio():
  one = MoEConfig(num_experts=1, num_experts_per_token=1)
  of = lambda *blocks: resolve(
    ModelConfig(segments=tuple(Segment((BlockConfig(moe=moe),), n) for moe, n in blocks))
  )
  four = MoEConfig(num_experts=4)
  mean = lambda model, *found: speedrun.max_vio({"max_vio": list(found)}, model)
  assert mean(of((four, 1), (one, 3)), 2.0, 0.0, 0.0, 0.0) == 2.0
  assert mean(of((one, 1), (four, 2)), 0.0, 1.0, 0.5) == 0.75
  assert mean(of((one, 2)), 0.0, 0.0) == 0.0
  assert speedrun.max_vio({}, resolve(ModelConfig(ffn="mlp"))) == 0.0
  assert mean(of((four, 1)), 1.0, 0.5) == 0.75  # of layers that are not known, all


def test_a_folder_with_a_file_that_was_not_written_whole_is_free(reference, tmp_path):
  (tmp_path / f"{disk.WRITING}abc").write_text("{")
  Speedrun(_slower(reference), reference, RULES, tmp_path, ABOUT, MACHINE)
  (tmp_path / "thesis.tex").write_text("precious")
  with pytest.raises(InputError, match="is not empty and holds no attempt"):
    Speedrun(_slower(reference), reference, RULES, tmp_path, ABOUT, MACHINE)


def _pair(seed: int, ratio: float, reached: bool = True) -> dict:
  numbers = dict.fromkeys(MEASURED, 100.0 + seed)
  shared = {"num_steps": 9, "bits_per_byte": 2.0, "max_vio": 0.1}
  attempt = {name: value * ratio for name, value in numbers.items()}
  return {
    "seed": seed,
    "machine": MACHINE,
    "versions": {"python": "3.12.1", "jax": f"0.1{seed % 2}"},
    "reference": {**numbers, **shared, "reached": True},
    "attempt": {**attempt, **shared, "reached": reached},
  }


def test_the_score_is_the_paired_ratio_with_a_t_interval():
  ratios = [0.7, 0.8, 0.75, 0.9, 0.85]
  pairs = [_pair(seed, ratio) for seed, ratio in enumerate(ratios)]
  expected = stats.ttest_1samp(np.log(ratios), 0.0).confidence_interval(0.95)
  for name in MEASURED:
    mean, low, high = score(pairs)[name]
    np.testing.assert_allclose([mean, low, high], np.exp([np.mean(np.log(ratios)), *expected]), rtol=1e-9)
  assert score(pairs[:1]) is None and score([*pairs, _pair(5, 0.7, reached=False)]) is None


def test_the_table_has_the_fastest_first_and_keeps_the_others(finished, tmp_path):
  _, entry = finished
  one = lambda name, pairs: entry | {"name": name, "seeds": pairs, "score": score(pairs)}
  missed = one("missed", [_pair(0, 1.0), _pair(1, 1.0, reached=False)])
  slow, fast = (one(name, [_pair(0, r), _pair(1, r)]) for name, r in (("slow", 1.5), ("fast", 0.5)))
  lines = table([missed, slow, fast]).splitlines()
  assert [line.split("|")[1].strip() for line in lines[2:]] == ["fast", "slow", "missed"]
  assert {line.count("|") for line in lines} == {14}
  assert "| 0.500 [0.500, 0.500] |" in lines[2] and "| 1 of 2 |" in lines[4]
  assert "| Python 3.12.1, JAX 0.10; Python 3.12.1, JAX 0.11 |" in lines[2]
  for one_entry in (slow, fast):
    (tmp_path / f"{one_entry['name']}.json").write_text(json.dumps(one_entry))
  assert [e["name"] for e in read_entries(tmp_path, lambda e: "")] == ["fast", "slow"]
  with pytest.raises(InputError, match=r"slow.json: is slow"):
    read_entries(tmp_path, lambda e: "is slow" if e["name"] == "slow" else "")
  (tmp_path / "deep.json").write_text("[" * 100_000)
  with pytest.raises(InputError, match=r"deep.json: is no whole JSON object$"):
    read_entries(tmp_path, lambda e: "")


def test_the_page_shows_the_committed_entries_and_wrong_flags_are_one_line(tmp_path):
  wrong = [
    (["--name=a|b"], "--name=a|b: name the attempt with letters"),
    (["--name=a", "--optimizer=muo"], "--optimizer=muo: unknown optimizer 'muo': did you mean muon"),
  ]
  commands = [["--table"], *([*arguments, f"--output_dir={tmp_path / 'run'}"] for arguments, _ in wrong)]
  shown, *refused = run_scripts(*(["experiments/speedrun.py", *arguments] for arguments in commands))
  assert shown.status == 0, shown
  page = (ROOT / "docs/LEADERBOARD.md").read_text()
  (block,) = page.split("<!-- made by --table -->\n")[1:2]
  assert block.partition("\n\n")[0] == shown.stdout.strip()
  for ended, (_, message) in zip(refused, wrong, strict=True):
    assert_one_line(ended, message)
  assert not (tmp_path / "run").exists()


# In a process of its own, because a script defines its flags when it is imported.
_LOOK = """
import json, sys
from absl import flags
from experiments import speedrun as s
from moe_jax.plugins import import_plugins
entry = json.loads((s.ENTRIES / "reference.json").read_text())
seeds = entry["seeds"]
data = lambda **fields: s.REFERENCE | {"data": s.REFERENCE["data"] | fields}
of = lambda **fields: {"seeds": [*seeds[:4], seeds[4] | {"attempt": seeds[4]["attempt"] | fields}]}
cases = [{}, {"reference": data(data_dir="x", text_folder="y")}, {"fingerprint": s.TEXT + "0" * 52},
  {"seeds": seeds[:1]}, {"seeds": [seeds[0]] * 5}, {"seeds": [*seeds[:4], seeds[4] | {"machine": {"cores": 16}}]},
  {"commit": "c" + s.CHANGED}, {"reference": data(tokenizer="bytes")}, {"attempt": data(dataset="lm1b")},
  {"attempt": s.REFERENCE | {"train": s.REFERENCE["train"] | {"init_from": "x"}}},
  {"rules": entry["rules"] | {"max_vio": 9.0}}, {"fingerprint": "0" * 64}, {"num_active_params": 9},
  {"score": entry["score"] | {"seconds": [0.1, 0.1, 0.1]}}, {"score": None}, of(reached=False), of(max_vio=0.4), of(tokens=128),
  of(num_steps=601), of(seconds=0.0)]
flags.FLAGS(["x", "--plugins=" + sys.argv[1]])
import_plugins(flags.FLAGS.plugins)
own = [str(path) for path in s._own_files()]
print(json.dumps([s.REFERENCE, entry["rules"], [s.what_is_wrong(entry | case) for case in cases], s.TEXT, own]))
"""


def test_the_reference_pins_every_field_and_entries_must_meet_the_rules(tmp_path):
  """A field that is added later must be added to it, with the value that keeps it as it was."""
  plugin = tmp_path / "mine.py"
  plugin.write_text("import numpy\n")
  done = subprocess.run(
    [sys.executable, "-c", _LOOK, str(plugin)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    timeout=100, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  reference, rules, found, text, own = json.loads(done.stdout)
  fine, wrong = found[:3], found[3:]

  def fields(values):
    return {k: fields(v) for k, v in values.items()} if isinstance(values, dict) else None

  assert fields(reference) == fields(Config().to_dict())
  page = " ".join((ROOT / "docs/LEADERBOARD.md").read_text().split())
  assert f"**Target.** {rules['target_bits_per_byte']:g} bits per byte" in page
  assert f"must be at most {rules['max_vio']:g}." in page
  assert (
    f"At most {rules['max_active_params']:,} active" in page
    and f"every {rules['evaluate_bytes']:,} bytes" in page
  )
  assert f"fingerprint `{text}`" in page
  assert fine == ["", "", ""]
  words = [
    "the seeds 0; run it with --seeds=5",
    "the seeds 0, 0, 0, 0, 0; run it with --seeds=5",
    "16 cores",
    "not committed",
    "another reference",
    "lm1b",
    "--init_from=x",
    "other rules",
    "other text (fingerprint 000000000000, not 7f0d9e2099f0)",
    "376,256 active parameters, and says 9",
    "another score",
    "another score",
    "seed 4 of the attempt: says reached=False",
    "seed 4 of the attempt: says reached=True",
    "says 128 tokens",
    "601 of 600 steps",
    "says 0.0 seconds",
  ]
  # What was imported of an attempt must be committed: here a file that no repository has.
  assert {str(plugin), str(ROOT / "moe_jax/plugins.py"), str(ROOT / "experiments/speedrun.py")} <= {*own}
  assert not any("numpy" in path for path in own)
  assert all(word in text for word, text in zip(words, wrong, strict=True)), wrong
