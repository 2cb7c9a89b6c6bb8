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
EVERY = "--dispatchers=einsum,sorted,dropless,all_to_all,all_gather"
COMMANDS = [
  # what is right times a factor; None: the script as it is, otherwise the layer's values alone
  (None, []),
  (None, [*FLAGS, "--dispatchers=dropless", "--json"]),
  (1.0, [*FLAGS, EVERY]),
  (1.03, [*FLAGS, "--dispatchers=sorted"]),
]
# One process for all of them, for starting one is what takes time.
CHILD = """
import contextlib, io, json, sys
for name in ("grain", "tensorflow_datasets"):
  sys.modules[name] = None  # importing it fails
from absl.testing import flagsaver
from moe_jax import cli
from scripts import gpu_check
right, ended = gpu_check.every_expert, []
for factor, arguments in json.load(sys.stdin):
  if factor is not None:
    gpu_check.every_expert = lambda *arguments: factor * right(*arguments)
    gpu_check.check_step = lambda config, names, init: {n: {"loss": 0.0, "step_gradients": 0.0} for n in names}
    gpu_check.time_layer = gpu_check.time_step = lambda *arguments: (1.0, 1.0)
  sys.argv, out, err = ["gpu_check.py", *arguments], io.StringIO(), io.StringIO()
  with flagsaver.flagsaver(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    try:
      cli.run(gpu_check.main)
    except SystemExit as end:
      ended.append([end.code or 0, out.getvalue(), err.getvalue()])
json.dump(ended, sys.stdout)
"""


def test_gpu_check_on_a_cpu():
  command, env = [sys.executable, "-c", CHILD], os.environ | {"PYTHONPATH": os.getcwd()}
  done = subprocess.run(
    command, input=json.dumps(COMMANDS), capture_output=True, text=True, timeout=240, env=env
  )
  assert done.returncode == 0, done.stderr
  no_gpu, reported, right, wrong = json.loads(done.stdout)
  assert no_gpu == [0, "gpu_check: JAX finds no gpu here, only cpu: nothing was checked\n", ""]
  assert reported[0] == right[0] == 0, (reported, right)
  assert "ceiling, plain products in bfloat16" in right[1]
  assert all(name in right[1] for name in EVERY.partition("=")[2].split(","))
  # Three in a hundred are more than rounding.
  assert wrong[0] == 1 and wrong[2].endswith("\nerror: wrong values: sorted y, sorted gradients\n")
  assert "checking the layer and the training step ... " in wrong[2]  # what runs is said at once
  assert_reported(json.loads(reported[1]))


def assert_reported(found):
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
