"""A short soak: two faults over a run, whose end equals that of a run that nothing disturbed.

That of several processes is too long for a test. tests/cluster has its main faults.
"""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_two_faults(tmp_path):
  command = [
    sys.executable,
    "scripts/soak.py",
    "--seed=3",
    "--faults=2",
    "--steps=60",
    f"--folder={tmp_path}/soak",
  ]
  env = os.environ | {"PYTHONPATH": str(ROOT)}
  ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
  assert ended.returncode == 0, ended.stdout + ended.stderr
  assert "faults: 2, starts: " in ended.stdout
  assert "runs whose end equals that of the undisturbed run: " in ended.stdout
  assert ended.stdout.rstrip()[-1] != "0"


def test_a_fault_that_there_is_not_is_one_line():
  command = [sys.executable, "scripts/soak_cluster.py", "--network=loopback", "--faults=kill"]
  ended = subprocess.run(
    command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
  )
  assert ended.returncode == 2 and ended.stdout == ""
  assert ended.stderr.startswith("error: --faults=kill: must be of kill -9 of the last process, ")
