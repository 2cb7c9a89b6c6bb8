"""Models that are made without training, measured for several seeds: what a claim of docs/findings.toml needs."""

import csv
import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from moe_jax import disk
from moe_jax.adapt.compress import Compressor
from moe_jax.adapt.table import calibration_batches, text_of
from moe_jax.analysis.measured import Measured
from moe_jax.comparison import findings
from moe_jax.comparison.report import read_stored
from moe_jax.errors import InputError
from moe_jax.inference.evaluate import ALL, Score, evaluate
from moe_jax.ops.balancing import BALANCERS
from moe_jax.training.digests import tree_digest
from moe_jax.training.load import load_run
from moe_jax.training.start import save_model
from tests import tiny
from tests.adapt import models
from tests.scripts import assert_one_line, run_scripts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("models")
  for seed in (0, 1):
    save_model(folder / f"seed_{seed}", models.model(seed=seed), tiny.CONFIG)
  return folder


def test_compression_and_quantisation_are_paired_by_seed_and_resume(folder, tmp_path):
  model = [f"--model={folder}/seed_{{seed}}", "--batches=1"]
  pruned = [
    "experiments/compress.py",
    *model,
    "--methods=usage,merge_usage",
    "--experts=4",
    "--calibration=1",
  ]
  pruned += [f"--output_dir={tmp_path}/pruned"]
  bits = ["experiments/quantise.py", *model, "--formats=int8,int4", f"--output_dir={tmp_path}/bits"]
  two = ["--seeds=2", "--route_batches=1"]
  wrong = [*pruned[:-2], "--calibration=1", "--experts=4,9", f"--output_dir={tmp_path}/wrong"]
  one, both, again, other, quantised, nine = run_scripts(
    pruned, [*pruned, two[0]], [*pruned, two[0]], [*pruned, "--calibration=2"], [*bits, *two], wrong
  )
  assert_one_line(nine, "error: --experts=9: layer 0 has 8 experts and a token takes 2; choose 2 to 8")
  assert one.status == both.status == again.status == quantised.status == 0, one.stderr + quantised.stderr
  assert "seed 0" in one.stderr and "seed 0" not in both.stderr and "seed" not in again.stderr
  assert_one_line(other, "holds numbers of other settings (calibration was 1, now 2)")

  loaded = load_run(folder / "seed_1")
  dataset = text_of(loaded)
  merged = Compressor(loaded.model, calibration_batches(dataset, 1))("merge_usage", 4)
  expected = evaluate(merged, dataset, dataset.config.batch_size, 1)
  with open(tmp_path / "pruned" / "compress.csv", newline="") as file:
    rows = {(int(row["seed"]), row["method"]): row for row in csv.DictReader(file)}
  assert len(rows) == 6
  for name, score in expected.items():
    np.testing.assert_allclose(float(rows[1, "merge_usage"][name]), score.nll, rtol=1e-5)
  result = disk.read_object(tmp_path / "pruned" / "arms" / "merge_usage_4" / "seed_1" / "result.json")
  assert result["init_from"]["digest"] == tree_digest(nnx.state(loaded.model, nnx.Param))

  tables = {name: read_stored(tmp_path / name) for name in ("pruned", "bits")}
  claim = lambda table, arm, against, quantity: findings.Finding(
    "", "", "", table, arm, against, quantity, "lower"
  )
  difference, vio = findings.tested(
    [claim("pruned", "merge_usage_4", "usage_4", "perplexity"), claim("bits", "int4", "float32", "max_vio")],
    tables,
  )
  assert sorted(difference.per_seed) == sorted(vio.per_seed) == [0, 1] and not difference.broken
  of = lambda method: np.exp(float(rows[1, method]["all"]))
  np.testing.assert_allclose(difference.per_seed[1], of("merge_usage") - of("usage"), rtol=1e-2, atol=1e-4)


def test_other_code_of_a_users_method_is_refused(folder, tmp_path):
  loaded = load_run(folder / "seed_0")

  def with_balancer(given):
    def mine():
      return given

    moe = dataclasses.replace(loaded.config.model.moe, balancers=BALANCERS.resolve_all(mine))
    model = dataclasses.replace(loaded.config.model, moe=moe)
    return loaded._replace(config=dataclasses.replace(loaded.config, model=model))

  def measured(given):
    scores = {ALL: Score(1.0, 1, 0)}
    return Measured(tmp_path, {})(
      "a", 0, with_balancer(given), text_of(loaded), lambda: (loaded.model, scores, {})
    )

  assert measured(1).scores == measured(1).scores
  with pytest.raises(
    InputError, match=r"a seed 0 was measured with other code of mine \[\w+\] \(now: mine \["
  ):
    measured(2)


def test_numbers_of_other_settings_or_states_of_the_same_parameters_are_refused(folder, tmp_path):
  loaded = load_run(folder / "seed_0")
  text, scores = text_of(loaded), {ALL: Score(1.0, 1, 0)}

  def measured(loaded):
    return Measured(tmp_path, {})("a", 0, loaded, text, lambda: (loaded.model, scores, {})).scores

  biased = dataclasses.replace(models.SPARSE, balancers=BALANCERS.resolve_all("loss_free_bias:0.001"))
  biased = models.model(dataclasses.replace(models.CONFIG, moe=biased))
  moved = nnx.clone(biased)
  nnx.update(moved, jax.tree.map(lambda x: x + 1, nnx.state(moved, nnx.Not(nnx.Param))))
  one = loaded._replace(model=biased)
  assert measured(one) == measured(one) == scores
  with pytest.raises(InputError, match=r"a seed 0 is of the same parameters with other .*\(variables was '"):
    measured(one._replace(model=moved))
  moe = dataclasses.replace(loaded.config.model.moe, num_experts_per_token=1)
  model = dataclasses.replace(loaded.config.model, moe=moe)
  more = one._replace(config=dataclasses.replace(loaded.config, model=model))
  with pytest.raises(InputError, match=r"\(num_experts_per_token was 2, now 1\); choose another"):
    measured(more)

  path = tmp_path / "arms/a/seed_0/result.json"  # of an older version, which did not keep these
  old = {name: value for name, value in disk.read_object(path).items() if name not in ("made_of", "digest")}
  disk.write_json(path, disk.with_digest(old))
  assert measured(more) == scores
