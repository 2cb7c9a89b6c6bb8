"""Instruction tuning of a dense and a sparse model: what each gains, on tasks that are trained and on others, paired by seed."""

import csv
import dataclasses
import shutil

import numpy as np
import pytest

from moe_jax import disk
from moe_jax.comparison.report import read_stored
from moe_jax.data import load_dataset
from moe_jax.training.compiled import make_model, resolve_config
from moe_jax.training.load import load_run
from moe_jax.training.start import save_model
from tests import tiny
from tests.adapt.models import forward
from tests.scripts import assert_one_line, run_scripts

LENGTH = 160
CONFIG = tiny.change(
  tiny.CONFIG, dataset="stdlib", balancers="none", capacity_factor=1.25, jitter=0.0, dispatcher="dropless",
  num_layers=1, dense_dim=32, remat="none",
)  # fmt: skip
FLAGS = [
  "--num_steps=2", "--batch_size=8", "--eval_batches=2", f"--sequence_length={LENGTH}", "--tensorboard=false",
  "--data_parallelism=1", "--learning_rate=0.01", "--held_out_tasks=name",
]  # fmt: skip
RETRAIN = """
import pathlib, shutil, sys
folder, before = map(pathlib.Path, sys.argv[1:])
shutil.rmtree(folder / "seed_0")
shutil.copytree(folder / "seed_1", folder / "seed_0")
before.unlink()
"""
UNFINISH = """
import pathlib, shutil, sys
tuned, copy = map(pathlib.Path, sys.argv[1:])
shutil.copytree(tuned, copy)
(copy / "seed_1/result.json").unlink()
"""
RETUNE = """
import sys
from moe_jax.training.result_file import read_result, write_result
path, change = sys.argv[1:]
result = read_result(path)
result["validation"]["nll"] += float(change)
write_result(path, result)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Has dense/, one_expert/ and sparse/ models of two seeds, and other/ of another text."""
  folder = tmp_path_factory.mktemp("models")
  kinds = {"dense": {"ffn": "mlp"}, "sparse": {}, "other": {"sequence_length": 32}}
  kinds["one_expert"] = {"num_experts": 1, "num_experts_per_token": 1}  # the arm `dense` of a comparison
  for kind, fields in kinds.items():
    config = resolve_config(tiny.change(CONFIG, **fields))
    for seed in (0, 1):
      save_model(folder / kind / f"seed_{seed}", make_model(config, 264, seed=seed), config)
  shutil.copytree(folder / "sparse/seed_0", folder / "mixed/seed_0")
  shutil.copytree(folder / "other/seed_1", folder / "mixed/seed_1")
  return folder


def nats(folder):
  """The mean loss over the responses of tasks that are trained, and of the one that is not, by a loop over rows."""
  text = {
    "dataset": "stdlib_tasks",
    "held_out_tasks": "name",
    "sequence_length": LENGTH,
    "tokenizer": "bytes",
  }
  dataset = load_dataset(dataclasses.replace(CONFIG.data, **text))
  model, found = load_run(folder).model, {True: [], False: []}
  for batch in dataset.validation_batches(limit=2):
    logits_BLV = np.asarray(forward(model, batch["tokens_BL"])[0], np.float64)  # padding is behind the text
    for row_LV, targets_L, is_target_L, domain in zip(
      logits_BLV, batch["targets_BL"], batch["is_target_BL"], batch["domain_B"], strict=True
    ):
      log_p = row_LV - np.log(np.exp(row_LV).sum(axis=-1, keepdims=True))
      own = -log_p[np.arange(len(log_p)), targets_L][is_target_L]
      found[dataset.info.domains[domain] == "name"] += list(own)
  return {"trained": np.mean(found[False]), "held_out": np.mean(found[True])}


def test_gains_are_losses_before_minus_after_and_differences_are_paired(folder, tmp_path):
  kinds = lambda dense, sparse: [
    f"--dense={folder}/{dense}/seed_{{seed}}",
    f"--sparse={folder}/{sparse}/seed_{{seed}}",
  ]
  command = [
    "experiments/instruct.py",
    *kinds("dense", "sparse"),
    *FLAGS,
    "--seeds=2",
    f"--output_dir={tmp_path}/out",
  ]
  wrong = ["experiments/instruct.py", *FLAGS, "--seeds=1", f"--output_dir={tmp_path}/wrong"]
  retrain = tmp_path / "retrain.py"
  retrain.write_text(RETRAIN)
  unfinish = tmp_path / "unfinish.py"
  unfinish.write_text(UNFINISH)
  half = tmp_path / "half"
  retune = tmp_path / "retune.py"
  retune.write_text(RETUNE)
  tune = lambda change: [str(retune), f"{tmp_path}/out/tuned/arms/dense/seed_1/result.json", change]
  first, again, of_one, _, *refused, _, retuned, _, retrained, changed = run_scripts(
    command,
    command,
    [*wrong[:-1], *kinds("one_expert", "sparse"), f"--output_dir={tmp_path}/one"],
    [str(unfinish), f"{tmp_path}/out/tuned/arms/dense", str(half)],
    [*wrong, f"--dense={half}/seed_{{seed}}", f"--sparse={half}/seed_{{seed}}", "--seeds=2"],
    [*wrong, *kinds("sparse", "sparse")],
    [*wrong, *kinds("dense", "other")],
    [*wrong, *kinds("dense", "mixed"), "--seeds=2"],
    [*command, "--learning_rate=0.02"],
    [*wrong, *kinds("dense", "sparse"), "--sequence_length=24"],
    [*wrong, *kinds("dense", "sparse"), "--seeds=5"],
    tune("1.0"),
    command,
    tune("-1.0"),
    [str(retrain), str(folder / "dense"), f"{tmp_path}/out/before/dense/seed_0.json"],
    command,
  )
  assert retuned.status == 2 and retuned.stderr.count("\n") == 1, retuned.stderr
  assert "arms/dense/seed_1: was tuned anew since its loss was measured; remove " in retuned.stderr
  assert (retrained.status, changed.status) == (0, 2) and changed.stderr.count("\n") == 1, changed.stderr
  assert "arm dense seed 0 was tuned from another model than the one whose loss before is" in changed.stderr
  assert first.status == again.status == 0, first.stderr + again.stderr
  assert of_one.status == 0 and (tmp_path / "one" / "gains.csv").read_text().count("sparse_") == 2, (
    of_one.stderr
  )
  assert "has no effect" not in first.stderr and "6 of 6 runs" in again.stdout
  messages = [f"{half}/seed_1: is not finished (step 2 of 2); the command that trains it continues it"]
  messages += ["has layers with routed experts"]
  messages += [f"other/seed_0: was not trained as {folder}/dense/seed_0 was (sequence_length 32, there 16)"]
  messages += [f"mixed/seed_1: was not trained as {folder}/dense/seed_0 was (sequence_length 32, there 16)"]
  messages += ["learning_rate"]
  messages += ["--sequence_length=24: ", "dense/seed_2: holds no run"]
  for ended, message in zip(refused, messages, strict=True):
    assert_one_line(ended, message)

  with open(tmp_path / "out" / "gains.csv", newline="") as file:
    rows = {(row["arm"], int(row["seed"])): row for row in csv.DictReader(file)}
  assert {arm for arm, _ in rows} == {"dense", "sparse_balanced", "sparse_not_balanced"} and len(rows) == 6
  tuned = tmp_path / "out" / "tuned"
  run = lambda arm, seed: tuned / "arms" / arm / f"seed_{seed}"
  for arm, kind in (("dense", "dense"), ("sparse_balanced", "sparse")):
    row = {key: float(x) for key, x in rows[arm, 1].items() if key != "arm"}
    before, after = nats(folder / kind / "seed_1"), nats(run(arm, 1))
    for tasks, gain in (("trained", "gain"), ("held_out", "gain_held_out")):
      np.testing.assert_allclose(row[f"{tasks}_before"], before[tasks], rtol=1e-5)
      np.testing.assert_allclose(row[f"{tasks}_after"], after[tasks], rtol=1e-5)
      np.testing.assert_allclose(row[gain], before[tasks] - after[tasks], rtol=1e-3, atol=1e-4)
      assert abs(row[gain]) > 1e-3

  differences = {(d.arm, d.key): d for d in read_stored(tuned).differences}
  for arm in ("sparse_balanced", "sparse_not_balanced"):
    for key in ("gain", "gain_held_out"):
      found = differences[arm, key]
      assert found.column.judged and not found.broken
      for seed in (0, 1):
        expected = float(rows[arm, seed][key]) - float(rows["dense", seed][key])
        np.testing.assert_allclose(found.per_seed[seed], expected, rtol=1e-9)
  balancers = {
    arm: disk.read_object(run(arm, 0) / "config.json")["model"]["moe"]["balancers"] for arm, _ in rows
  }
  assert balancers["sparse_balanced"] == "switch_loss" and balancers["sparse_not_balanced"] == "none"
