"""An experiment run with several command lines in one process, for starting one is what takes time."""

import json
import pathlib
import subprocess
import sys

TINY_RUN = [
  *(
    "--preset=tiny",
    "--dataset=markov",
    "--markov_states=16",
    "--num_layers=1",
    "--model_dim=16",
    "--head_dim=8",
  ),
  *("--batch_size=4", "--sequence_length=16", "--num_steps=12", "--notensorboard", "--data_parallelism=1"),
]

_SEVERAL = """
import contextlib, importlib, io, json, sys
from absl.testing import flagsaver
from moe_jax import cli
experiment = importlib.import_module(f"experiments.{sys.argv[1]}")
found = []
for arguments in json.loads(sys.argv[2]):
  sys.argv = ["experiment.py", *arguments]
  with flagsaver.flagsaver(), contextlib.redirect_stderr(io.StringIO()) as stderr:
    try:
      cli.run(experiment.main)
    except SystemExit as end:
      found.append([end.code or 0, stderr.getvalue()])
print(json.dumps(found))
"""


def run(experiment: str, command_lines: list[list[str]]) -> list[tuple[int, str]]:
  """(status, stderr) of each."""
  command = [sys.executable, "-c", _SEVERAL, experiment, json.dumps(command_lines)]
  done = subprocess.run(command, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr
  return [tuple(ended) for ended in json.loads(done.stdout.splitlines()[-1])]


def assert_refuses(experiment: str, cases: list[tuple[list[str], str]], folder: pathlib.Path) -> None:
  """Each (arguments, message) ends with that one line and status 2, and `folder` is not written."""
  ended = run(experiment, [[*arguments, f"--output_dir={folder}"] for arguments, _ in cases])
  for (status, stderr), (arguments, message) in zip(ended, cases, strict=True):
    assert status == 2, arguments
    assert message in stderr and stderr.startswith("error: ") and len(stderr.strip().splitlines()) == 1
  assert not folder.exists()
