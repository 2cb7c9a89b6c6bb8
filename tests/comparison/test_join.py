"""Joining folders of made results, without training: what is refused, and which results are taken."""

import itertools

import pytest
from rich.console import Console

from moe_jax import disk
from moe_jax.comparison.join import join
from moe_jax.errors import InputError
from tests import tiny
from tests.comparison.made_results import make_result

CONFIG = tiny.change(tiny.CONFIG, num_steps=30, schedule="constant", warmup_steps=1)
QUIET = Console(quiet=True)


def write(folder, results, config=CONFIG, **claim):
  """The folder of a comparison with these results."""
  arms, seeds = {r["arm"]: {} for r in results}, sorted({r["seed"] for r in results})
  claim = {"arms": arms, "seeds": seeds, "config": config.to_dict()} | claim
  disk.write_json(folder / "config.json", claim)
  for result in results:
    path = folder / "arms" / result["arm"] / f"seed_{result['seed']}"
    disk.write_json(path / "result.json", result)
  return folder


def test_a_longer_run_is_another_comparison_whichever_folder_comes_first(tmp_path):
  """Though it may continue a shorter one, in its folder."""
  short = write(tmp_path / "short", [make_result("a", 0)])
  long = write(tmp_path / "long", [make_result("a", 1)], tiny.change(CONFIG, num_steps=60))
  for one, other in itertools.permutations((short, long)):
    with pytest.raises(InputError, match=r"is another comparison than .*\(num_steps was 60, now 30\)"):
      join([one, other], tmp_path / "joined", QUIET)
  assert not (tmp_path / "joined").exists()
