"""scripts/gpu_check.py on CPU: it runs without the data libraries, detects wrong values, and reports a missing GPU."""

import json
import os
import subprocess
import sys

import pytest

SIZES = {
  "num_layers": 1,
  "model_dim": 32,
  "num_heads": 2,
  "num_kv_heads": 1,
  "head_dim": 16,
  "expert_dim": 16,
  "num_experts": 8,
  "num_experts_per_token": 2,
  "capacity_factor": 4.0,  # what is timed is then what is checked, and compiled once
  "sequence_length": 32,
  "batch_size": 2,
  "vocab_size": 64,
  "matmul_size": 64,
  "repeats": 1,
  "platform": "cpu",
}
FLAGS = [f"--{name}={value}" for name, value in SIZES.items()]
WITHOUT = """
import sys
for name in ("grain", "tensorflow_datasets"):
  sys.modules[name] = None  # importing it fails
from moe_jax import cli
from scripts import gpu_check
"""
# The layer alone, against what is right times `FACTOR`.
LAYER = """
right = gpu_check.every_expert
gpu_check.every_expert = lambda *arguments: FACTOR * right(*arguments)
gpu_check.check_step = lambda config, names, init: {n: {"loss": 0.0, "step_gradients": 0.0} for n in names}
gpu_check.time_layer = gpu_check.time_step = lambda *arguments: (1.0, 1.0)
"""


def _run(program, *arguments):
  command = [sys.executable, "-c", f"{WITHOUT}{program}cli.run(gpu_check.main)\n", *arguments]
  env = os.environ | {"PYTHONPATH": os.getcwd()}
  return subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)


def test_without_a_gpu_one_line_says_so():
  ended = _run("")
  assert (ended.returncode, ended.stderr) == (0, "")
  assert ended.stdout == "gpu_check: JAX finds no gpu here, only cpu: nothing was checked\n"


def test_values_and_speed_are_reported():
  ended = _run("", *FLAGS, "--dispatchers=dropless", "--json")
  assert ended.returncode == 0, ended.stderr
  found = json.loads(ended.stdout)
  assert found["wrong"] == [] and found["device"] == "cpu" and found["versions"]["jax"]
  errors = found["errors"]["dropless"]
  assert errors.keys() == found["at_most"].keys()
  assert all(0 < errors[name] <= most for name, most in found["at_most"].items())
  layer, step = (found["speed"]["dropless"][part] for part in ("layer", "step"))
  tokens = SIZES["batch_size"] * SIZES["sequence_length"]
  # Router and three matrices of two experts, forward and twice backward.
  needed = 3 * 2 * SIZES["model_dim"] * (SIZES["num_experts"] + 2 * 3 * SIZES["expert_dim"]) * tokens
  for part in (layer, step):
    assert part["of_ceiling"] * found["ceiling_tflops"] == pytest.approx(part["tflops"])
    assert part["tokens_per_second"] * part["milliseconds"] / 1e3 == pytest.approx(tokens)
  assert layer["tflops"] * 1e12 * layer["milliseconds"] / 1e3 == pytest.approx(needed)


def test_every_dispatcher_is_right():
  every = "--dispatchers=einsum,sorted,dropless,all_to_all,all_gather"
  ended = _run(LAYER.replace("FACTOR", "1.0"), *FLAGS, every)
  assert ended.returncode == 0, ended.stderr
  assert "ceiling, plain products in bfloat16" in ended.stdout


def test_a_wrong_value_is_named():
  """Three in a hundred are more than rounding."""
  ended = _run(LAYER.replace("FACTOR", "1.03"), *FLAGS, "--dispatchers=sorted")
  assert ended.returncode == 1
  assert ended.stderr == "error: wrong values: sorted y, sorted gradients\n"
