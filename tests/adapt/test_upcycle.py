"""An upcycled model computes what the dense one computes, and changes nothing that it does not name."""

import csv
import dataclasses
import json

import numpy as np
import pytest

from moe_jax.adapt import check_upcycle, upcycle
from moe_jax.adapt.layers import take_apart
from moe_jax.errors import InputError
from moe_jax.nn.routers import ROUTERS
from tests.adapt import models
from tests.adapt.models import SPARSE, hashes, logits
from tests.scripts import assert_one_line, run_scripts

change = dataclasses.replace


@pytest.fixture(scope="module")
def dense():
  return models.model(models.DENSE)


def close(a, b, rtol=1e-5):
  """Sums of K equal terms with weights that add up to 1 round differently from one term."""
  np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())


@pytest.mark.parametrize(
  ("fields", "options"),
  [
    ({}, {}),  # copies, renormalised weights, a random router
    ({}, {"shuffle": True}),  # one expert is a whole copy in another order
    ({"expert_dim": 8, "num_experts_per_token": 4}, {}),  # halves, and both halves of a copy are taken
    ({"expert_dim": 4, "num_experts": 16, "num_experts_per_token": 4}, {"shuffle": True}),
    ({"expert_dim": 32}, {}),  # an expert of two copies
    ({"router": "softmax_topk:softmax=before"}, {"router_scale": 0.0}),
    (
      {"router": "softmax_topk:softmax=before", "expert_dim": 8, "num_experts_per_token": 4},
      {"router_scale": 0.0},
    ),
    ({"router": "sigmoid_topk"}, {"router_scale": 0.0}),
    ({"router": "sigmoid_topk:normalize=true:scale=2.5"}, {}),
  ],
)
def test_it_equals_the_dense_model(dense, fields, options):
  sparse = upcycle(dense, change(SPARSE, **fields), **options)
  close(logits(sparse), logits(dense))


def test_weights_that_do_not_sum_to_1_scale_the_dense_part_by_a_known_factor(dense):
  """K / E = 0.25 of the dense output with a router of zeros: what the dense model computes with its output x 0.25."""
  moe = change(SPARSE, router="softmax_topk:softmax=before")
  sparse = upcycle(dense, moe, router_scale=0.0, scale=1.0)
  quarter = upcycle(dense, SPARSE, scale=0.25)
  close(logits(sparse), logits(quarter))
  assert np.abs(logits(sparse) - logits(dense)).max() > 1e-3


def test_it_changes_only_the_feed_forward_parts_it_names(dense):
  before, after = hashes(dense), hashes(upcycle(dense, SPARSE, layers=[1]))
  gone, new = before.keys() - after.keys(), after.keys() - before.keys()
  assert gone == {f"1.ffn.{name}" for name in ("w_gate_DF", "w_up_DF", "w_down_FD")}
  experts = {f"1.ffn.experts.{name}" for name in ("w_gate_EDF", "w_up_EDF", "w_down_EFD")}
  assert new == {*experts, "1.ffn.router.w_router_DE", "1.ffn.balancer_state"}
  assert all(after[path] == before[path] for path in before.keys() - gone)


def test_the_configuration_says_what_the_blocks_are(dense):
  assert upcycle(dense, SPARSE).config.segments == ()  # by the short fields, which flags have
  mixed = upcycle(dense, SPARSE, layers=[1]).config
  assert [str(block.ffn) for segment in mixed.blocks for block in segment.pattern] == ["mlp", "moe"]


def test_a_share_of_hidden_units_is_new_and_the_same_in_all_matrices(dense):
  copied, half = (take_apart(upcycle(dense, SPARSE, reinit=share)).layers[0] for share in (0.0, 0.5))
  is_new = []
  for name, units in (("w_gate_EDF", 1), ("w_up_EDF", 1), ("w_down_EFD", 2)):
    path = f"ffn.experts.{name}"
    is_new.append((half.values[path] != copied.values[path]).all(axis=units))
    np.testing.assert_array_equal(is_new[-1], (half.values[path] != copied.values[path]).any(axis=units))
    drawn = half.values[path].swapaxes(1, units)[is_new[-1]]
    assert 0.7 < drawn.std() / copied.values[path].std() < 1.3
  for other in is_new:
    np.testing.assert_array_equal(other, is_new[0])
  np.testing.assert_array_equal(is_new[0].sum(axis=1), 8)  # of 16 units of each expert
  assert len({tuple(row) for row in is_new[0]}) > 1  # experts differ


def test_noise_is_in_standard_deviations_of_the_matrix(dense):
  plain, noisy = (
    take_apart(upcycle(dense, SPARSE, noise=n)).layers[0].values["ffn.experts.w_up_EDF"] for n in (0, 0.1)
  )
  assert 0.08 < (noisy - plain).std() / plain.std() < 0.12


@pytest.mark.parametrize(
  ("fields", "options", "match"),
  [
    ({}, {"reinit": 1.5}, "reinit is a share of hidden units, between 0 and 1, got 1.5"),
    ({}, {"layers": [5]}, r"layers=\[5\] are not dense; dense layers are \[0, 1\]"),
    ({"experts": "relu"}, {}, "--experts=relu: the dense parts are swiglu"),
    ({"num_shared_experts": 1}, {}, "--num_shared_experts=1"),
    ({"router": "llama4_topk"}, {}, "--router=llama4_topk: weighs what experts read"),
    ({"num_experts_per_token": 9}, {}, "num_experts_per_token"),
  ],
)
def test_what_is_wrong_is_said_in_one_line(dense, fields, options, match):
  with pytest.raises(InputError, match=match):
    upcycle(dense, change(SPARSE, **fields), **options)


OF_ONE = ("switch_top1", "base_assignment")  # expert per token
NEEDS = {"cosine_topk": "normalize=true"}  # no logits of a new one are equal
REFUSED = {
  "llama4_topk": "weighs what experts read",
  "remoe": "its weights are 0 while all logits are equal; give `scale`, or choose another router",
  "node_limited_topk": "group_top=2 must be between 1 and the 1 experts of a group",
}
REFUSED |= dict.fromkeys(
  ("noisy_topk", "hierarchical_topk", "task_level", "merged_topk"), "does not follow from logits alone"
)
LEAKS = ("sequence_level", "topology_aware_topk", "expert_choice", "token_rounding", "base_assignment")
LEAKS += ("sinkhorn", "quantile_topk")
REFUSED |= dict.fromkeys(LEAKS, "in a causal model its output depends on later tokens")


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_makes_an_equal_model_or_is_refused_beforehand(dense, name):
  """With a router of zeros, whose logits are equal."""
  router = f"{name}:{NEEDS[name]}" if name in NEEDS else name
  moe = change(SPARSE, router=router, num_experts_per_token=1 if name in OF_ONE else 2)
  if name in REFUSED:
    with pytest.raises(InputError, match=f"^--router={name}: .*{REFUSED[name]}"):
      check_upcycle(dense.config, moe)
    return
  check_upcycle(dense.config, moe)
  close(logits(upcycle(dense, moe, router_scale=0.0)), logits(dense))


def test_a_scale_that_is_given_needs_no_weights(dense):
  moe = change(SPARSE, router="remoe")
  assert check_upcycle(dense.config, moe, scale=1.0).router.name == "remoe"
  assert np.isfinite(logits(upcycle(dense, moe, scale=1.0))).all()


def test_a_model_without_dense_layers_is_refused():
  with pytest.raises(InputError, match="no layer with a dense"):
    upcycle(models.model(), SPARSE)


SIZES = [
  "--preset=tiny", "--dataset=markov", "--num_layers=1", "--model_dim=16", "--head_dim=8", "--dense_dim=16",
  "--num_experts=4", "--remat=none", "--sequence_length=16", "--batch_size=8", "--tensorboard=false",
  "--data_parallelism=1", "--num_steps=3", "--eval_every=1", "--eval_batches=1", "--seeds=2", "--warmup_steps=1",
]  # fmt: skip
DAMAGES_A_LINE = """
import pathlib, sys
path = pathlib.Path(sys.argv[1])
lines = path.read_text().splitlines(keepends=True)
path.write_text("".join("mine\\n" if '"step": 2,' in line else line for line in lines) + "\\r\\n \\n")
"""


def test_the_script_keeps_what_it_made_of_the_dense_models(tmp_path):
  out, loses = tmp_path / "out", tmp_path / "loses.py"
  loses.write_text(DAMAGES_A_LINE)
  run = out / "arms_after" / "arms" / "upcycled" / "seed_1"
  command = ["experiments/upcycle.py", *SIZES, f"--output_dir={out}"]
  diverges = [*command[:-1], f"--output_dir={tmp_path}/other", "--learning_rate=1e30", "--dense_steps=2"]
  refused = [*command[:-1], f"--output_dir={tmp_path}/refused", "--router=remoe"]
  first, longer, lost, again, diverged, *early = run_scripts(
    [*command, "--dense_steps=2"],
    [*command, "--dense_steps=4"],
    [str(loses), str(run / "metrics.jsonl")],
    [*command, "--dense_steps=2"],
    diverges,
    refused,
    [
      "experiments/round_trip.py",
      f"--output_dir={tmp_path}/refused",
      "--preset=tiny",
      "--dataset=markov",
      "--router=remoe",
    ],
  )
  for script in early:  # before a dense model is trained
    assert_one_line(script, "--router=remoe: its weights are 0 while all logits are equal")
  assert not list((tmp_path / "refused").rglob("metrics.jsonl"))
  assert first.status == lost.status == again.status == 0, first.stderr + lost.stderr + again.stderr
  start = out / "start" / "upcycled" / "seed_0"
  assert_one_line(longer, f"{start}: was made of another model (step was 2, now 4); choose another folder")
  assert diverged.status == 2 and "error: dense seed 0 has gradient norm nan at step 2" in diverged.stderr, (
    diverged
  )
  assert "in a new folder. Nothing can be made of such a model" in diverged.stderr
  of_dense = json.loads((out / "dense" / "arms" / "dense" / "seed_0" / "result.json").read_text())
  assert of_dense["num_steps"] == 2  # was not trained on

  assert first.stdout.count("lower in") == 4 and "seeds at step 2" in first.stdout
  # A run that lacks a line, as one that diverged does, leaves its cell empty. Blank lines are none.
  with open(out / "curves.csv", newline="") as file:
    rows = {(row["arm"], row["seed"]): row for row in csv.DictReader(file)}
  empty = {(*row, step) for row, cells in rows.items() for step in ("1", "2") if not cells[step]}
  assert len(rows) == 8 and empty == {("upcycled", "1", "2")}
  printed = again.stdout.partition("mean over 2 seeds")[2].splitlines()
  means = next(line for line in printed if line.startswith("upcycled  ")).split()
  np.testing.assert_allclose(
    float(means[1]), np.mean([float(rows["upcycled", seed]["1"]) for seed in "01"]), atol=1e-4
  )
  assert means[2] == "-"
  crossings = {line.partition(":")[0]: line for line in printed if " against " in line}
  assert len(crossings) == 4 and "lacks" not in first.stdout
  for what, line in crossings.items():
    assert line.endswith("at step 1; of 2 evaluations, those that a run lacks are left out: step 2") == (
      what.endswith(" upcycled")
    )
  assert f"{run}/metrics.jsonl: is damaged" in again.stderr and "and 2 cannot be read" in again.stderr
