"""Comparisons: paired arms, one output folder, resumed work, and one-line errors for invalid input."""

import json
import re

import numpy as np
import pytest

from moe_jax import fingerprint
from moe_jax.analysis.kept import Kept
from moe_jax.comparison import folder as comparison_folder
from moe_jax.comparison.arms import balancing_arm
from moe_jax.comparison.comparison import Comparison
from moe_jax.comparison.folder import ComparisonFolder
from moe_jax.data import load_dataset
from moe_jax.errors import InputError
from moe_jax.training import loop as train_loop
from moe_jax.training.loop import Run
from moe_jax.training.metric_writer import read_jsonl
from tests import tiny

NAMES = ["none", "loss_free_bias:0.05", "switch_loss:0.1+z_loss:0.01"]
ARMS = {name: balancing_arm(name) for name in NAMES}
TWO = {name: ARMS[name] for name in NAMES[:2]}
CONFIG = tiny.change(tiny.CONFIG, num_steps=3, eval_batches=2, clip_norm=1.0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """(folder, results) of two arms."""
  folder = tmp_path_factory.mktemp("comparison") / "run"
  comparison = Comparison(TWO, [0], CONFIG, folder)
  results = comparison.run()
  comparison.report(results, title="t", question="q", command="c", notes=["a note"])
  return folder, results


def test_writes_one_folder(finished):
  folder, _ = finished
  names = "config.json metrics.jsonl summary.csv report.html max_vio.png load_heatmap.png"
  assert set(names.split()) <= {path.name for path in folder.iterdir()}
  page = (folder / "report.html").read_text().replace("<wbr>", "")
  assert "a note" in page and all(arm in page for arm in TWO)
  lines = read_jsonl(folder / "metrics.jsonl")
  assert [(line["arm"], line["step"]) for line in lines] == [(arm, s) for arm in TWO for s in (1, 2, 3)]


@pytest.mark.parametrize(
  ("seeds", "why"),
  [
    ([], "there is none"),
    ([0, 1, 0], "0 is there twice"),
    ([0, 2**31], "2147483648 is no integer"),
    ([0, -1], "-1 is no"),
    ([0, 1.0], "1.0 is no"),
    ([True], "True is no"),
  ],
)
def test_wrong_seeds_are_refused_before_any_training(seeds, why, tmp_path):
  with pytest.raises(InputError, match=f"^seeds: {why}"):
    Comparison(TWO, seeds, CONFIG, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_seeds_may_be_of_numpy(tmp_path):
  seeds = Comparison(TWO, np.arange(2), CONFIG, tmp_path / "run").seeds
  assert seeds == [0, 1] and {type(seed) for seed in seeds} == {int}


def test_without_arms_there_is_nothing_to_report(tmp_path):
  comparison = Comparison({}, [0], CONFIG, tmp_path / "run")
  with pytest.raises(InputError, match="no results to report, because the comparison has no arms"):
    comparison.report(comparison.run(), title="t", question="q", command="c")


def test_arms_start_alike_and_read_the_same_batches(finished):
  """The first step's loss and load come before any balancing has acted."""
  folder, _ = finished
  first = [line for line in read_jsonl(folder / "metrics.jsonl") if line["step"] == 1]
  # Two programs, which may sum the 8 x 16 tokens in different orders.
  assert first[0]["loss"] == pytest.approx(first[1]["loss"], rel=8 * 16 * 2.0**-23)
  assert first[0]["tokens_per_expert"] == first[1]["tokens_per_expert"]
  assert first[0]["arm"] != first[1]["arm"]


def test_finished_runs_are_kept_and_arms_can_be_added(finished, monkeypatch):
  folder, results = finished
  trained = []
  train = train_loop.Run.train

  def recorded(self):
    trained.append(self.label)
    return train(self)

  monkeypatch.setattr(train_loop.Run, "train", recorded)
  again = Comparison(ARMS, [0], CONFIG, folder).run()
  assert trained == NAMES[2:]
  assert again[:2] == results
  assert list(json.loads((folder / "config.json").read_text())["arms"]) == NAMES


def test_runs_that_other_code_trained_are_kept_with_a_word(finished, monkeypatch, capsys):
  folder, results = finished
  assert {r["versions"]["code"] for r in results} == {fingerprint.of_package()}
  ComparisonFolder(folder).note_other_code()
  assert capsys.readouterr().err == ""
  monkeypatch.setattr(comparison_folder, "of_package", lambda: "0" * 12)
  ComparisonFolder(folder).note_other_code()
  (line,) = capsys.readouterr().err.splitlines()
  assert re.search(
    rf"was trained by other code .* runs: \d+, such as .*digest {fingerprint.of_package()}, now 0{{12}}", line
  )


def test_the_digest_of_the_package_changes_with_its_files(tmp_path, monkeypatch):
  monkeypatch.setattr(fingerprint, "__file__", str(tmp_path / "fingerprint.py"))
  digests = set()
  for name, text in (("a.py", "1"), ("a.py", "2"), ("b/a.py", "2"), ("c.txt", "2")):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    digests.add(fingerprint.of_package.__wrapped__())
  assert len(digests) == 3  # a file of another kind is not code


def test_another_configuration_text_or_meaning_of_an_arm_is_refused(finished):
  folder, _ = finished
  with pytest.raises(InputError, match=r"holds a run with another configuration \(num_steps was 3, now 4\)"):
    Comparison(ARMS, [0], tiny.change(CONFIG, num_steps=4), folder)
  with pytest.raises(InputError, match="holds results on other text"):
    ComparisonFolder(folder).check_text("0" * 64)
  with pytest.raises(InputError, match="arm none: balancers was 'none', now 'z_loss'"):
    Comparison({"none": {"balancers": "z_loss"}}, [0], CONFIG, folder)


def test_a_field_that_is_younger_than_the_folder_has_its_default_there(finished, tmp_path):
  folder, _ = finished
  claim = json.loads((folder / "config.json").read_text())
  del claim["config"]["model"]["moe"]["jitter"], claim["config"]["train"]["tail_fraction"]
  (tmp_path / "config.json").write_text(json.dumps(claim))
  with pytest.raises(InputError, match=r"configuration \(jitter was 0.0, now 0.1\)"):
    Comparison(ARMS, [0], tiny.change(CONFIG, jitter=0.1), tmp_path)
  Comparison(ARMS, [0], tiny.change(CONFIG, jitter=0.0), tmp_path)


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
  (tmp_path / "thesis.tex").write_text("precious")
  with pytest.raises(InputError, match="is not empty and holds no run"):
    Comparison(ARMS, [0], CONFIG, tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
  ("arms", "fields", "message"),
  [
    (
      ["none", "switch_los:0.1"],
      {},
      "^arm switch_los:0.1: .*unknown balancer 'switch_los': did you mean switch_loss",
    ),
    (
      ["none", "z_loss@switch_top1"],
      {},
      "^arm z_loss@switch_top1: --num_experts_per_token=2: router switch_top1",
    ),
    (
      ["none"],
      {"num_experts_per_token": 9},
      "^--num_experts_per_token=9: must be between 1 and num_experts=8",
    ),
    (["none"], {"seed": -1}, "^--seed=-1: must be 0 or more"),
    (["none"], {"capacity_factor": 0.0}, "--capacity_factor=0.0: must be above 0"),
    (["none"], {"router": "softmax_top"}, "unknown router 'softmax_top': did you mean softmax_topk"),
    (["none"], {"router": "switch_top1"}, "--num_experts_per_token=2: router switch_top1 takes 1"),
    (["none"], {"dispatcher": "einsun"}, "unknown dispatcher 'einsun': did you mean einsum"),
    (["none"], {"batch_size": 7, "accumulation": 2}, "--accumulation=2: must divide batch_size=7"),
    (["none"], {"moe_every": 3}, "--moe_every=3: must divide the 2 layers"),
    (["none"], {"num_kv_heads": 3}, "--num_kv_heads=3: must divide num_heads=2"),
  ],
)
def test_wrong_input_is_one_line_before_anything_is_written(tmp_path, arms, fields, message):
  with pytest.raises(InputError, match=message) as caught:
    arms = {arm: balancing_arm(arm) for arm in arms}
    Comparison(arms, [0], tiny.change(CONFIG, **fields), tmp_path / "run")
  assert "\n" not in str(caught.value)
  assert not (tmp_path / "run").exists()


def test_a_folder_in_that_of_the_text_is_refused_before_anything_is_written(tmp_path):
  """By each that writes what a run is: its files would be other text for the start that continues."""
  (tmp_path / "a.txt").write_text("abc " * 400)
  config = tiny.change(CONFIG, dataset="text_folder", text_folder=str(tmp_path))
  data = load_dataset(config.data)
  for write in (
    lambda folder: Comparison(ARMS, [0], config, folder),
    lambda folder: Run(config, data, folder),
    lambda folder: Kept(folder, {}, config),
  ):
    with pytest.raises(
      InputError, match=f"^{tmp_path}/out: is in the folder of the text, --text_folder={tmp_path}"
    ):
      write(tmp_path / "out")
  assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
