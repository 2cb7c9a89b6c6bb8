"""A test that hangs ends the test command's wait, and is named."""

import pathlib
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Hangs in C code, which no signal reaches: a lock is taken twice.
HANGS = """
import ctypes

def test_that_hangs():
  lock = ctypes.create_string_buffer(256)
  for _ in range(2):
    ctypes.CDLL(None).pthread_mutex_lock(lock)

def test_after_it(): ...
"""


@pytest.mark.skipif(sys.platform != "linux", reason="its hanging test calls glibc")
def test_a_hang_names_itself(tmp_path):
  limits = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
  assert 0 < limits["faulthandler_timeout"] < limits["timeout"]  # stacks while there still is a process
  (tmp_path / "test_hanging.py").write_text(HANGS)
  options = [
    "-c",
    str(ROOT / "pyproject.toml"),
    "--rootdir=.",
    "-otimeout=1",
    "-ofaulthandler_timeout=0.5",
    "-n1",
  ]
  command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, "test_hanging.py"]
  ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False)
  assert ended.returncode == 1
  assert "1 failed, 1 passed" in ended.stdout
  assert "crashed while running 'test_hanging.py::test_that_hangs'" in ended.stdout
  assert 'test_hanging.py", line 7 in test_that_hangs' in ended.stderr
