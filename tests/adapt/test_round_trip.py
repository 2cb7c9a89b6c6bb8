"""The whole life of a model in one command: every row is a model that loads, and the command resumes."""

import csv
import json

import numpy as np

import moe_jax
from moe_jax.adapt.table import text_of
from moe_jax.inference.evaluate import evaluate
from moe_jax.ops.balancing import BALANCERS
from moe_jax.plugins import import_plugins
from tests.adapt import models
from tests.scripts import assert_one_line, run_scripts

SIZES = [
  "--preset=tiny", "--num_layers=1", "--model_dim=16", "--head_dim=8", "--dense_dim=16", "--num_experts=4",
  "--remat=none", "--sequence_length=16", "--batch_size=8", "--tensorboard=false", "--data_parallelism=1",
  "--dense_steps=3", "--num_steps=2", "--distil_steps=2", "--eval_batches=2", "--calibration=1", "--formats=int4:4",
]  # fmt: skip
NAMES = [
  "dense",
  "dense_longer",
  "upcycled",
  "sparse",
  "distilled",
  "merged",
  "pruned",
  "extracted_b",
  "int4:4",
]
OWN = """
import moe_jax
from moe_jax.ops.balancing import make_balancer
def mine():
  return make_balancer("switch_loss:0.01")  # 1
moe_jax.register("balancer", "mine", mine)
"""
FORGET = """
import pathlib, sys
folder = pathlib.Path(sys.argv[1])
names = ["rows", "settings.json", "models"]
for name in names:
  old, new = folder / name, folder.parent / name
  new.rename(old) if sys.argv[2:] else old.rename(new)
"""


def test_a_dense_model_goes_all_ways_and_the_command_resumes(tmp_path, monkeypatch):
  for domain in "ab":
    (tmp_path / "text" / domain).mkdir(parents=True)
    for i in range(30):
      (tmp_path / "text" / domain / f"{i}.txt").write_text(f"{domain} {i} of many words " * 4)
  out = tmp_path / "out"
  text = ["--dataset=text_folder", f"--text_folder={tmp_path / 'text'}", "--domain=b"]
  own = tmp_path / "own.py"
  own.write_text(OWN)
  with_own = [f"--plugins={own}", "--balancers=mine"]
  command = ["experiments/round_trip.py", *SIZES, *text, *with_own, f"--output_dir={out}"]
  forget = tmp_path / "forget.py"  # as a kill left it while the first model was measured
  forget.write_text(FORGET)
  first, again, other, forgotten, seed, restored = run_scripts(
    command,
    command,
    [*command, "--num_steps=3"],
    [str(forget), str(out)],
    [*command, "--seed=1"],
    [str(forget), str(out), "back"],
  )
  assert first.status == forgotten.status == restored.status == 0, first.stderr
  line = f"\nerror: {out}/runs/dense: holds a run with another configuration (seed was 0, now 1); "
  assert seed.status == 2 and line in seed.stderr and seed.stderr.count("\n") == 2, seed.stderr
  # Nothing is made or measured again.
  assert again.stdout and first.stdout.endswith(again.stdout) and "..." not in again.stderr
  assert_one_line(other, f"{out}: holds numbers of other settings (num_steps was 2, now 3)")
  own.write_text(OWN.replace("# 1", "or 1"))
  (edited,) = run_scripts(command)
  assert_one_line(edited, f"{out}: holds numbers of other settings (code of experts was ")

  with open(out / "round_trip.csv", newline="") as file:
    rows = {row["model"]: row for row in csv.DictReader(file)}
  assert list(rows) == NAMES and (out / "round_trip.png").stat().st_size > 10_000
  number = lambda name, column: float(rows[name][column])
  # An upcycled model begins as the dense one; the student is dense, and half of the experts are less of everything.
  np.testing.assert_allclose(number("upcycled", "perplexity"), number("dense", "perplexity"), rtol=1e-5)
  assert rows["distilled"]["max_vio"] == "" and rows["distilled"]["bytes"] == rows["dense"]["bytes"]
  assert number("int4:4", "bytes") < number("pruned", "bytes") < number("sparse", "bytes")
  for smaller in ("merged", "pruned", "extracted_b"):
    gone = 2 * 3 * 16 * 8  # two experts of three matrices of D x F
    columns = 0 if smaller == "merged" else 2 * 16  # of the router, which is kept where experts are merged
    assert number("sparse", "parameters") - number(smaller, "parameters") == gone + columns
  assert [rows[name]["steps"] for name in ("dense", "sparse", "distilled")] == ["3", "5", "7"]
  monkeypatch.setattr(BALANCERS, "_factories", dict(BALANCERS))
  import_plugins([str(own)])
  for name in ("sparse", "merged", "int4:4"):
    loaded = moe_jax.load(out / "models" / name.replace(":", "_"))
    score = evaluate(loaded.model, text_of(loaded), 8, 2)
    np.testing.assert_allclose(score["all"].perplexity, number(name, "perplexity"), rtol=1e-5)
    np.testing.assert_allclose(score["b"].bits_per_byte, number(name, "in b"), rtol=1e-5)
  assert models.hashes(moe_jax.load(out / "models" / "sparse").model) == models.hashes(
    moe_jax.load(out / "runs" / "sparse").model
  )
  assert json.loads((out / "rows" / "merged.json").read_text())["active"] == int(rows["merged"]["active"])
