"""Policy gradients: rewards, advantages and the clipped loss against loops, and a script that runs and resumes."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.adapt.reinforce import TASKS, clipped_loss, group_advantages, reward, split_questions
from moe_jax.errors import InputError
from tests.scripts import assert_one_line, run_scripts


def test_tasks_have_the_answers_that_they_say():
  assert TASKS["brackets"].answer("([{<") == ">}])"
  assert TASKS["digits"].answer("4013") == "0134"
  assert reward("ab", "ab") == 1 and reward("ax", "ab") == 0.25 and reward("x", "ab") == 0
  held, draw = split_questions(TASKS["digits"], 2, 20, seed=3)
  assert draw(50, 7) == draw(50, 7) != draw(50, 8) and not set(draw(500, 0)) & set(held)
  assert len(set(held)) == len(held)
  with pytest.raises(InputError, match="--length=2: there are 16 questions of it, and 20 are held out"):
    split_questions(TASKS["brackets"], 2, 20, seed=3)


def test_the_clipped_loss_and_its_gradient_are_those_of_a_loop():
  rng = np.random.default_rng(0)
  new, old = rng.normal(size=(2, 6, 5)) * 0.3
  advantage, is_target = rng.normal(size=6), rng.random((6, 5)) < 0.7
  loss, clipped, log_ratio, gradient = 0.0, 0, 0.0, np.zeros((6, 5))
  for b in range(6):
    for t in np.flatnonzero(is_target[b]):
      ratio, a = np.exp(new[b, t] - old[b, t]), advantage[b]
      is_cut = (a > 0 and ratio > 1.2) or (a < 0 and ratio < 0.8)
      bounded = min(max(ratio, 0.8), 1.2)
      loss -= min(ratio * a, bounded * a)
      clipped += is_cut
      log_ratio += abs(new[b, t] - old[b, t])
      gradient[b, t] = 0 if is_cut else -a * ratio
  n = is_target.sum()
  arrays = (jnp.asarray(x, jnp.float32) for x in (old, advantage))
  old_BL, advantage_B = arrays
  of = lambda new_BL: clipped_loss(new_BL, old_BL, advantage_B, jnp.asarray(is_target))
  new_BL = jnp.asarray(new, jnp.float32)
  found = of(new_BL)
  np.testing.assert_allclose(found, (loss / n, clipped / n, log_ratio / n), rtol=1e-5)
  np.testing.assert_allclose(jax.grad(lambda x: of(x).loss)(new_BL), gradient / n, rtol=1e-4, atol=1e-7)


def test_advantages_of_a_prompt_have_mean_zero_and_no_scale():
  rewards = np.random.default_rng(0).random((3, 8))
  found = group_advantages(rewards)
  np.testing.assert_allclose(found.mean(axis=1), 0, atol=1e-7)
  np.testing.assert_allclose(found, group_advantages(rewards * 5 + 2), rtol=1e-2)
  np.testing.assert_array_equal(group_advantages(np.ones((1, 4))), np.zeros((1, 4)))


@pytest.mark.slow
def test_the_script_compares_both_arms_and_resumes(tmp_path):
  command = [
    "experiments/reinforce.py",
    "--num_layers=1",
    "--model_dim=16",
    "--head_dim=8",
    "--num_experts=4",
  ]
  command += ["--num_steps=2", "--rl_steps=2", "--questions=2", "--answers=4", "--length=4", "--seeds=1"]
  command += ["--tensorboard=false", "--data_parallelism=1", "--remat=none", f"--output_dir={tmp_path}/out"]
  first, again, diverged, no_rate = run_scripts(
    command,
    command,
    [
      *command[:-1],
      "--rl_learning_rate=1e30",
      "--questions=4",
      "--answers=8",
      f"--output_dir={tmp_path}/diverged",
    ],
    [*command[:-1], "--rl_learning_rate=nan", f"--output_dir={tmp_path}/nan"],
  )
  assert_one_line(no_rate, "error: --rl_learning_rate=nan: must be a finite number")
  assert diverged.status == 2
  assert (
    "\nerror: live seed 0 has numbers that are not finite at step 2 of --rl_steps; try" in diverged.stderr
  )
  assert not (tmp_path / "diverged" / "arms").exists()
  assert first.status == again.status == 0, first.stderr
  assert (
    "replay" in first.stderr and again.stderr == "" and again.stdout == first.stdout[-len(again.stdout) :]
  )
  with open(tmp_path / "out" / "reinforce.csv", newline="") as file:
    rows = list(csv.DictReader(file))
  assert [(row["arm"], row["step"]) for row in rows] == [
    ("live", "1"),
    ("live", "2"),
    ("replay", "1"),
    ("replay", "2"),
  ]
  for row in rows:
    # Before an update, the ratio is that of the routes of the arm.
    np.testing.assert_allclose(
      float(row["log_ratio"]), float(row[f"log_ratio_{row['arm']}"]), rtol=1e-3, atol=1e-6
    )
    assert 0 <= float(row["differing"]) < 0.5 and 0 < float(row["log_ratio_replay"]) < 0.1
