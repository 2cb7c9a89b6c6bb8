"""A few tests once more, compiled as users compile: the suite's own settings (conftest.py) are those of nobody else."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
# The golden curve, a law of each kind, and a sharded step with its exchange.
TESTS = [
  "tests/training/test_loop.py::test_golden_run",
  "tests/ops/test_router_laws.py::test_equals_the_loop[mask-bias-softmax_topk]",
  "tests/ops/test_balancer_laws.py::test_gradient_equals_finite_differences_of_the_loop[switch_global_batch]",
  "tests/sharding/test_parallel_equality.py::test_step_is_the_same[expert2.tensor2-dropless]",
]


def run(*tests: str) -> subprocess.CompletedProcess:
  command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
  env = os.environ | {"MOE_JAX_TEST_REAL_SETTINGS": "1"}
  return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=280, check=False)


@pytest.mark.slow
def test_laws_hold_under_the_settings_of_a_run():
  ended = run(*TESTS)
  unknown = [test for test in TESTS if re.search(f"not found: .*{test.partition('[')[0]}", ended.stderr)]
  assert not unknown, f"there are no such tests, so name others in {__file__}: {unknown}"
  assert ended.returncode == 0, ended.stdout + ended.stderr
  assert f" {len(TESTS)} passed in" in ended.stdout  # none skipped
  assert "\nXLA_FLAGS: --xla_force_host_platform_device_count=8\n" in ended.stdout
