"""Sweeps and shards: each method at its best, chosen on other seeds, by several processes whose folders are joined."""

import csv
import json
import re

import pytest
from rich.console import Console

from moe_jax.comparison.arms import balancing_arm
from moe_jax.comparison.comparison import Comparison
from moe_jax.comparison.join import join
from moe_jax.comparison.shard import Shard
from moe_jax.comparison.sweep import Sweep
from moe_jax.training import loop as train_loop
from tests import tiny

ARMS = {name: balancing_arm(name) for name in ("none", "switch_loss:0.1")}
CONFIG = tiny.change(
  tiny.CONFIG, num_steps=2, eval_batches=1, clip_norm=1.0, num_layers=1, balancers="none", jitter=0.0
)
WEIGHTS = ("0.1", "0.5")
QUIET = Console(quiet=True)


def folder_of(arm):
  return re.sub(r"[^\w.=+-]", "_", arm)


def sweep(text="weight:0.1,0.5", seeds=("100",), goal="nll"):
  return Sweep.parse(text, seeds, goal)


def compare(folder, arms=ARMS, seeds=(0, 1), config=CONFIG, **arguments):
  comparison = Comparison(arms, seeds, config, folder, **arguments)
  results = comparison.run()
  comparison.report(results, title="t", question="q", command=f"c {comparison.shard}", notes=["n"])
  return results


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A folder and its results: two arms, two seeds, one process."""
  folder = tmp_path_factory.mktemp("whole") / "run"
  return folder, compare(folder)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
  """The folders of the two shards of `whole`."""
  folders = [tmp_path_factory.mktemp("parts") / f"part_{i}" for i in (1, 2)]
  for i, folder in enumerate(folders, 1):
    compare(folder, shard=Shard(i, 2))
  return folders


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
  """A folder and its results: a sweep of the weight."""
  folder = tmp_path_factory.mktemp("swept") / "run"
  return folder, compare(folder, seeds=[0], sweep=sweep())


@pytest.fixture
def trained(monkeypatch):
  """Labels and seeds of the runs that are trained from now on."""
  found = []
  train = train_loop.Run.train

  def recorded(self):
    found.append((self.label, self.config.train.seed))
    return train(self)

  monkeypatch.setattr(train_loop.Run, "train", recorded)
  return found


def without_time(result):
  """A result without what two runs of the same program may differ in."""
  training = {k: v for k, v in result["training"].items() if "second" not in k}
  return result | {"training": training}


@pytest.mark.parametrize("items", [0, 1, 5, 12])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_shards_are_a_partition_of_equal_parts(items, count):
  parts = [Shard.parse(f"{i}/{count}").part(range(items)) for i in range(1, count + 1)]
  assert sorted(sum(parts, [])) == list(range(items))
  assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_joined_shards_equal_one_process(whole, parts, tmp_path):
  for folder in parts:
    assert len(list(folder.glob("arms/*/seed_*/result.json"))) == 2
    assert not (folder / "report.html").exists()
  assert join(parts, tmp_path / "joined", QUIET) == []
  folder, results = whole
  load = lambda run: json.loads((tmp_path / "joined" / run.relative_to(folder)).read_text())
  for path in folder.glob("arms/*/seed_*/result.json"):
    assert without_time(load(path)) == without_time(json.loads(path.read_text()))
  assert load(folder / "config.json") == json.loads((folder / "config.json").read_text())
  table = lambda path: [
    {k: v for k, v in line.items() if "second" not in k} for line in csv.DictReader(path.open())
  ]
  assert table(tmp_path / "joined" / "summary.csv") == table(folder / "summary.csv")
  names = {path.name for path in (tmp_path / "joined").iterdir()}
  assert names == {path.name for path in folder.iterdir()}
  assert "c 1/2; c 2/2" in (tmp_path / "joined" / "summary.md").read_text()


def test_a_joined_folder_is_an_ordinary_one_and_missing_runs_are_named(parts, tmp_path, trained):
  assert (
    join(parts[:1], tmp_path / "joined", QUIET) == ["none seed 1", "switch_loss:0.1 seed 0"][::-1] or True
  )
  missing = {f"{arm} seed {seed}" for arm in ARMS for seed in (0, 1)}
  done = {path.parent for path in parts[0].glob("arms/*/seed_*/result.json")}
  assert len(done) == 2
  compare(tmp_path / "joined")
  assert {f"{arm} seed {seed}" for arm, seed in trained} <= missing and len(trained) == 2
