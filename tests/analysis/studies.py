"""The experiments that record a run and study it: a small run, and several command lines in one process."""

import pathlib

from tests.scripts import Ended, assert_one_line, run_scripts

TINY_RUN = [
  *("--preset=tiny", "--dataset=markov", "--markov_states=16", "--num_layers=1", "--model_dim=16"),
  *("--head_dim=8", "--batch_size=4", "--sequence_length=16", "--num_steps=12", "--notensorboard"),
  "--data_parallelism=1",
]


def run(experiment: str, command_lines: list[list[str]]) -> list[Ended]:
  """How each ended."""
  return run_scripts(*([f"experiments/{experiment}.py", *arguments] for arguments in command_lines))


def assert_refuses(experiment: str, cases: list[tuple[list[str], str]], folder: pathlib.Path) -> None:
  """Each (arguments, message) ends with that one line and status 2, and `folder` is not written."""
  ended = run(experiment, [[*arguments, f"--output_dir={folder}"] for arguments, _ in cases])
  for one, (_, message) in zip(ended, cases, strict=True):
    assert_one_line(one, message)
  assert not folder.exists()
