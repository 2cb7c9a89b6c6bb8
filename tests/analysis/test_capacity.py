"""The capacity study: one model evaluated at many factors, the same numbers on eight devices, and its files."""

import csv
import functools
import json
import pathlib
import shutil

import numpy as np
import pytest

from moe_jax import locks
from moe_jax.analysis.capacity import report, study, tables
from moe_jax.analysis.capacity.study import Setting
from moe_jax.comparison import comparison
from moe_jax.comparison.comparison import Comparison
from moe_jax.comparison.folder import ComparisonFolder
from moe_jax.config import MeshConfig
from moe_jax.errors import InputError
from moe_jax.training import evaluation
from moe_jax.training import loop as train_loop
from moe_jax.training.result_file import read_result, write_result
from tests import tiny

CONFIG = tiny.change(
  tiny.CONFIG, num_steps=3, eval_batches=2, clip_norm=1.0, num_layers=1, balancers="none", jitter=0.0
)
METHODS = study.methods(CONFIG)
EVALUATED = ["0.5", "1", "none"]


def plan_of(*names, factors=("0.5", "none"), groups=("sequence",), eval_factors=EVALUATED, config=CONFIG):
  chosen = {name: METHODS[name] for name in names}
  arguments = {"factors": factors, "eval_factors": eval_factors, "groups": groups, "dispatcher": "einsum"}
  return study.make_plan(config, chosen, **arguments)


def run(plan, folder, config=CONFIG):
  return {r["arm"]: r for r in Comparison(plan.arms, [0], config, folder, evaluations=plan.evaluations).run()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """(folder, plan, results by arm) of GShard with and without a capacity, and of Switch with one."""
  folder = tmp_path_factory.mktemp("capacity") / "run"
  plan = plan_of("gshard_top2", "switch_top1")
  del plan.arms["switch_top1 dropless"], plan.evaluations["switch_top1 dropless"]
  return folder, plan, run(plan, folder)


def numbers(evaluation):
  return {k: evaluation[k] for k in ("nll", "max_vio", "dropped_fraction")}


def test_one_model_is_evaluated_at_every_factor(finished, tmp_path):
  _, plan, results = finished
  for arm, result in results.items():
    factor = Setting.parse(arm).factor
    names = [factor if factor == "none" else f"{factor} sequence" for factor in EVALUATED]
    assert list(result["evaluations"]) == names
    own = factor if factor == "none" else f"{factor} sequence"
    assert numbers(result["evaluations"][own]) == numbers(result["validation"])
    dropped = [np.mean(result["evaluations"][name]["dropped_fraction"]) for name in names]
    assert dropped[0] > dropped[1] > dropped[2] == 0
  # An independent way to the same numbers: the factor of evaluation changes nothing in training.
  plan = plan_of("gshard_top2", factors=["0.5"], eval_factors=["none"])
  arm = dict(plan.arms["gshard_top2 0.5 sequence"]) | {"eval_capacity_factor": 1.0}
  (other,) = Comparison({"a": arm}, [0], CONFIG, tmp_path / "run").run()
  assert numbers(other["validation"]) == numbers(
    results["gshard_top2 0.5 sequence"]["evaluations"]["1 sequence"]
  )


def test_an_evaluation_says_whether_it_looks_ahead(finished):
  _, _, results = finished
  sees = lambda arm: [e["sees_later_tokens"] for e in results[arm]["evaluations"].values()]
  assert sees("gshard_top2 0.5 sequence") == sees("gshard_top2 dropless") == [True, True, False]
  assert sees("switch_top1 0.5 sequence") == [False] * 3


@pytest.mark.parametrize(
  ("seeds", "written"), [((False, None), ""), ((None, True), "True"), ((False, False), "False")]
)
def test_a_table_does_not_claim_what_was_not_measured(finished, tmp_path, seeds, written):
  _, _, results = finished
  arm = "switch_top1 0.5 sequence"
  made = [results[arm] | {"seed": i, "sees_later_tokens": sees} for i, sees in enumerate(seeds)]
  tables.write_csv(tmp_path / "capacity.csv", tables.cells(made, {arm: Setting.parse(arm)})[:1])
  (line,) = csv.DictReader((tmp_path / "capacity.csv").open())
  assert line["sees_later_tokens"] == written


def test_a_further_factor_needs_no_training(finished, monkeypatch):
  folder, plan, results = finished
  monkeypatch.setattr(train_loop.Run, "train", None)
  again = run(plan_of("gshard_top2", eval_factors=[*EVALUATED, "2"]), folder)
  for arm, result in again.items():
    assert {k: v for k, v in result["evaluations"].items() if k != "2 sequence"} == results[arm][
      "evaluations"
    ]
    assert np.isfinite(result["evaluations"]["2 sequence"]["nll"])
  arm, name = "gshard_top2 dropless", "0.5 sequence"
  changed = {arm: {name: plan.evaluations[arm][name] | {"eval_capacity_factor": 0.7}}}
  with pytest.raises(InputError, match=f"evaluation {arm}: {name}: eval_capacity_factor was 0.5, now 0.7"):
    Comparison(plan.arms, [0], CONFIG, folder, evaluations=changed)


def test_a_name_with_other_fields_is_another_evaluation(finished, tmp_path, monkeypatch):
  """Also where config.json is lost, which says what a name meant. Numbers under the same fields are kept."""
  folder, plan, results = finished
  arm, evaluations = "switch_top1 0.5 sequence", plan.evaluations["switch_top1 0.5 sequence"]
  run_of = ComparisonFolder(tmp_path).run(arm, 0)
  shutil.copytree(ComparisonFolder(folder).run(arm, 0), run_of)
  other = {arm: evaluations | {"0.5 sequence": evaluations["none"]}}
  calls, evaluate_as = [], evaluation.evaluate_as
  monkeypatch.setattr(train_loop.Run, "train", None)
  monkeypatch.setattr(
    evaluation, "evaluate_as", lambda run, of: (calls.append([*of]), evaluate_as(run, of))[1]
  )
  again = lambda: Comparison({arm: plan.arms[arm]}, [0], CONFIG, tmp_path, evaluations=other).run()[0]
  # A run that is not among those locked from the start on, while another command has it.
  monkeypatch.setattr(comparison, "_LOCKED_AHEAD", 0)
  with locks.hold(run_of / locks.LOCK, ""), monkeypatch.context() as of_another_process:
    of_another_process.setattr(locks, "_held", {})
    with pytest.raises(InputError, match="seed_0: in use by process"):
      again()
  found = again()["evaluations"]
  assert calls == [["0.5 sequence"]] * 2 and again()["evaluations"] == found and len(calls) == 2
  before = results[arm]["evaluations"]
  assert found == before | {"0.5 sequence": before["none"]} and before["none"] != before["0.5 sequence"]
  # A result of older code does not say under what it was evaluated.
  result = read_result(run_of / "result.json")
  del result["evaluation_digests"]
  write_result(run_of / "result.json", result)
  assert again() == result and len(calls) == 2


def test_another_model_is_no_evaluation(finished):
  folder, plan, _ = finished
  wider = {arm: {"wide": {"expert_dim": 64}} for arm in plan.arms}
  with pytest.raises(InputError, match="a checkpoint of another configuration"):
    Comparison(plan.arms, [0], CONFIG, folder, evaluations=wider).run()


def test_gshard_is_the_same_on_eight_devices(finished, tmp_path):
  _, plan, results = finished
  arm = "gshard_top2 0.5 sequence"
  names = ("0.5 sequence", "none")
  some = plan._replace(
    arms={arm: plan.arms[arm]}, evaluations={arm: {name: plan.evaluations[arm][name] for name in names}}
  )
  sharded = run(some, tmp_path / "run", tiny.change(CONFIG, mesh=MeshConfig(data=1, expert=8)))[arm]
  for part in ("loss", "dropped_fraction"):
    np.testing.assert_allclose(sharded["training"][part], results[arm]["training"][part], rtol=1e-5)
  for name in names:
    many, one = sharded["evaluations"][name], results[arm]["evaluations"][name]
    assert many["dropped_fraction"] == one["dropped_fraction"] and many["max_vio"] == one["max_vio"]
    assert many["nll"] == pytest.approx(one["nll"], rel=1e-5)


def test_groups_of_a_device_on_one_device_are_groups_of_the_batch(tmp_path):
  plan = plan_of("none", factors=["1"], groups=study.GROUPS, eval_factors=[])
  results = run(plan, tmp_path / "run")
  sequence, batch, device = (results[f"none 1 {group}"] for group in study.GROUPS)
  assert batch["validation"]["dropped_fraction"] == device["validation"]["dropped_fraction"]
  assert batch["validation"]["nll"] == pytest.approx(device["validation"]["nll"], rel=1e-5)
  assert np.mean(batch["training"]["dropped_fraction"]) < np.mean(sequence["training"]["dropped_fraction"])


def test_an_arm_without_capacity_is_evaluated_in_all_groups():
  plan = plan_of("none", groups=("sequence", "batch"))
  assert list(plan.evaluations["none dropless"]) == [
    "0.5 sequence",
    "0.5 batch",
    "1 sequence",
    "1 batch",
    "none",
  ]
  assert list(plan.evaluations["none 0.5 batch"]) == ["0.5 batch", "1 batch", "none"]
  assert (
    plan.arms["none 0.5 batch"]["group_size"] == 8 * plan.arms["none 0.5 sequence"]["group_size"] == 8 * 16
  )


def test_the_files_have_every_number(finished, tmp_path):
  _, _, results = finished
  notes = report.write(tmp_path, list(results.values()), "command")
  assert {p.name for p in tmp_path.iterdir()} == {
    "capacity.csv",
    "capacity.md",
    "capacity.png",
    "dropped.png",
  }
  lines = {
    (line["method"], line["train_factor"], line["eval_factor"]): line
    for line in csv.DictReader((tmp_path / "capacity.csv").open())
  }
  assert len(lines) == 3 * 3
  line = lines["gshard_top2", "0.5", "none"]
  nll = results["gshard_top2 0.5 sequence"]["evaluations"]["none"]["nll"]
  assert float(line["nll_mean"]) == nll and float(line["bits_mean"]) == pytest.approx(nll / np.log(2))
  assert (line["nll_std"], line["num_seeds"], line["sees_later_tokens"]) == ("", "1", "False")
  page = (tmp_path / "capacity.md").read_text()
  assert f"{nll / np.log(2):.4f}" in page and "`switch_top1`, groups of a sequence:" in page
  assert "trained at 0.75 and evaluated at 2: ST-MoE top-1 +0.026; ST-MoE top-2 +0.027." in notes[1]


def test_a_diverged_run_and_fewer_evaluations_of_one_seed_leave_the_rest(finished, tmp_path):
  """As `diverged_result` writes it; and a second seed that was evaluated at fewer factors."""
  _, _, results = finished
  arm, switch = "gshard_top2 0.5 sequence", "switch_top1 0.5 sequence"
  infinite = dict.fromkeys(("nll", "perplexity", "bits_per_byte"), "Infinity")
  diverged = {"arm": switch, "seed": 1, "config": {}, "diverged": "a reason", "validation": infinite}
  second = results[arm] | {"seed": 1, "evaluations": {"none": results[arm]["evaluations"]["none"]}}
  notes = report.write(tmp_path, [second, *results.values(), diverged], "command")
  lines = list(csv.DictReader((tmp_path / "capacity.csv").open()))
  num_seeds = {(x["method"], x["train_factor"], x["eval_factor"]): int(x["num_seeds"]) for x in lines}
  assert len(lines) == 3 * 3 and {num_seeds["gshard_top2", "0.5", factor] for factor in ("0.5", "none")} == {
    2
  }
  assert num_seeds["gshard_top2", "0.5", "1"] == 1 and num_seeds["switch_top1", "0.5", "none"] == 1
  said = [
    f"Diverged, left out of capacity.csv and capacity.md: {switch} seed 1.",
    f"Not all seeds have these evaluations: {arm} at 1 sequence (seeds 0 of 0, 1).",
  ]
  page = (tmp_path / "capacity.md").read_text()
  assert notes[1:3] == said and " ".join(said) in page and "inf" not in page and "Bits per token" in page
  assert report.write(tmp_path, [diverged], "command")[1] == said[0]  # nothing else is there


def test_the_files_are_of_all_commands_in_the_folder(finished, tmp_path, monkeypatch):
  """Whose arms are others. What is said of the numbers is said once, of those that are there now."""
  folder = pathlib.Path(shutil.copytree(finished[0], tmp_path / "run"))
  monkeypatch.setattr(train_loop.Run, "train", None)
  texts = {"title": "t", "question": "q", "notes": ["n"], "varies": ["slots"]}
  rows = lambda: [(x["method"], x["train_factor"]) for x in csv.DictReader((folder / "capacity.csv").open())]
  for name, factors in (("switch_top1", ["0.5"]), ("gshard_top2", ["0.5", "none"])):
    plan = plan_of(name, factors=factors)
    compared = Comparison(plan.arms, [0], CONFIG, folder, evaluations=plan.evaluations)
    beside = functools.partial(report.write, folder)
    compared.report(compared.run(), command=f"c {name}", beside=beside, **texts)
    every = [("gshard_top2", "0.5"), ("gshard_top2", "none"), ("switch_top1", "0.5")]
    assert {*rows()} == {*every}
    page = (folder / "report.html").read_text().replace("<wbr>", "")
    assert page.count("Loss minus that of") == page.count(report.FURTHER) == 1
    assert json.loads((folder / "report.json").read_text())["notes"] == ["n"]
  assert (folder / "capacity.md").read_text().startswith("`c switch_top1; c gshard_top2`\n")


def test_a_setting_is_that_of_the_name_of_its_arm():
  for arm in plan_of("none", "switch_top1", factors=("0.5", "1", "none"), groups=study.GROUPS).arms:
    assert str(Setting.parse(arm)) == arm
  assert Setting.parse("none") is None and Setting.parse("switch_loss:0.1 weight=0.1") is None


def cell(trained, evaluated, **nll):
  by_seed = {int(seed[1:]): x for seed, x in nll.items()}
  return tables.Cell(
    Setting("m", trained, "sequence"), evaluated, "sequence", by_seed, by_seed, by_seed, by_seed, False
  )


def test_our_differences_are_paired_by_seed():
  found = [cell("0.75", "2", s0=3.0, s1=5.0), cell("1.25", "1.25", s0=2.0, s1=3.0)]
  (note,) = tables.st_moe_in_words(found)
  assert (
    "trained at 0.75 and evaluated at 2: ST-MoE top-1 +0.026; ST-MoE top-2 +0.027; m, sequence +1.500 ± 0.707."
    in note
  )


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: study.parse_factors("capacity_factors", ["1", "-1"]), "--capacity_factors=-1: must be a number above 0"),
    (lambda: study.parse_factors("capacity_factors", ["inf"]), "--capacity_factors=inf: must be a number above 0"),
    (lambda: study.parse_factors("capacity_factors", ["x"]), "--capacity_factors=x: must be a number above 0, or none"),
    (lambda: study.parse_factors("capacity_factors", ["1", "1.0"]), "--capacity_factors=1,1.0: must be different"),
    (lambda: study.parse_factors("capacity_factors", []), "--capacity_factors=: must be different factors"),
    (lambda: plan_of("none", groups=("tree",)), "--group=tree: must be different ones of sequence, batch, device"),
    (lambda: plan_of("none", groups=()), "--group=: must be different ones"),
  ],
)  # fmt: skip
def test_wrong_input_is_one_line(call, message):
  with pytest.raises(InputError, match=message):
    call()
