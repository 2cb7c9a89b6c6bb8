"""Joining folders of made results, without training: what is refused, and which results are taken."""

import io
import itertools
import shutil

import pytest
from rich.console import Console

from moe_jax import disk
from moe_jax.comparison.folder import ComparisonFolder
from moe_jax.comparison.join import join
from moe_jax.comparison.results import load_results
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


def test_two_paths_of_one_model_are_one_path_too_many(tmp_path):
  """Also where the files are the same: what a run starts from is known by its path."""
  for name, of in (("init_from", ""), ("objective", "distil:teacher=")):
    folders = [tmp_path / f"{name}_{i}" for i in range(2)]
    for seed, folder in enumerate(folders):
      write(folder, [make_result("a", seed)], arms={"a": {name: f"{of}/path_{seed}"}})
    with pytest.raises(
      InputError, match=r"one version of the code, with one path of the model .* on all machines$"
    ):
      join(folders, tmp_path / "joined", QUIET)
  one, other = (
    write(tmp_path / str(i), [make_result("a", i)], tiny.change(CONFIG, num_layers=i)) for i in (1, 2)
  )
  with pytest.raises(InputError, match=r"one version of the code$"):
    join([one, other], tmp_path / "joined", QUIET)


def test_one_path_with_two_contents_is_two_models(tmp_path):
  start = lambda digest: {"init_from": {"folder": "model", "digest": digest}}
  folders = [tmp_path / str(i) for i in range(2)]
  for i, folder in enumerate(folders):
    write(folder, [make_result("a", i) | start(str(i))])
  assert ComparisonFolder(folders[1]).starts() == {"model": "1"}
  message = r"started from other parameters in model \(digest 1\) than .*seed_0 \(0\)"
  with pytest.raises(InputError, match=message):
    join(folders, tmp_path / "joined", QUIET)
  assert not (tmp_path / "joined").exists()


def test_a_run_that_has_not_been_made_longer_yet_is_missing(tmp_path):
  """A shard was stopped after the command had been given with more steps."""
  of = lambda seed, steps: make_result("a", seed) | {"config": {"train": {"num_steps": steps}}}
  config = tiny.change(CONFIG, num_steps=60)
  folders = [write(tmp_path / str(seed), [of(seed, steps)], config) for seed, steps in enumerate((60, 30))]
  out = io.StringIO()
  assert join(folders, tmp_path / "joined", Console(file=out, width=500)) == ["a seed 1"]
  assert out.getvalue().startswith("no report: no folder has a report.json of this version")


@pytest.fixture
def parts(tmp_path):
  """Two folders with one run each."""
  return [write(tmp_path / f"part_{seed}", [make_result("a", seed)]) for seed in (0, 1)]


def test_a_file_that_cannot_be_copied_is_named_and_nothing_is_left(parts, tmp_path):
  (parts[1] / "arms/a/seed_1/lost").symlink_to(tmp_path / "nowhere")
  with pytest.raises(InputError, match=r"arms/a/seed_1/lost: cannot be copied \(.*No such file.* files: 1$"):
    join(parts, tmp_path / "joined", QUIET)
  assert sorted(path.name for path in tmp_path.iterdir()) == ["part_0", "part_1"]


def test_a_kill_while_it_copies_leaves_the_name_free(parts, tmp_path, monkeypatch):
  (tmp_path / "joined").mkdir()  # an empty one is as good as none
  copytree = shutil.copytree

  def killed(source, *arguments, **options):
    if "part_1" in str(source):
      raise KeyboardInterrupt
    return copytree(source, *arguments, **options)

  with monkeypatch.context() as kill, pytest.raises(KeyboardInterrupt):
    kill.setattr(shutil, "copytree", killed)
    kill.setattr(shutil, "rmtree", lambda *_, **options: None)  # kill -9 leaves no time for that
    join(parts, tmp_path / "joined", QUIET)
  assert [*tmp_path.glob(f"{disk.WRITING}joined-*/arms/a/seed_0/result.json")]
  assert join(parts, tmp_path / "joined", QUIET) == []
  assert len([*(tmp_path / "joined").glob("arms/a/*/result.json")]) == 2
  assert (tmp_path / "joined").stat().st_mode & 0o777 == 0o755


def test_what_a_sweep_tried_is_left_where_the_comparison_is_of_none(parts, tmp_path):
  """A sweep that was stopped before it chose, in a folder that was then used without one."""
  write(parts[0] / "sweep", [make_result("a weight=1", 100)])
  assert join(parts, tmp_path / "joined", QUIET) == []
  assert not (tmp_path / "joined/sweep").exists() and not (tmp_path / "joined/sweep.csv").exists()


def test_of_two_results_of_one_run_the_one_with_more_evaluations_is_taken(tmp_path):
  evaluations = [{"1": {"nll": 2.0}}, {"1": {"nll": 2.0}, "2": {"nll": 1.0}}]
  folders = [
    write(tmp_path / f"part_{i}", [make_result("a", 0) | {"evaluations": of}])
    for i, of in enumerate(evaluations)
  ]
  for order in itertools.permutations(folders):
    joined = tmp_path / f"joined_{order[0].name}"
    assert join(order, joined, QUIET) == []
    assert load_results(joined)[0]["evaluations"] == evaluations[1]


def test_versions_are_compared_where_the_first_run_diverged(tmp_path):
  diverged = {k: v for k, v in make_result("a", 0).items() if k != "versions"} | {"diverged": "at step 1"}
  first, second = (
    make_result(arm, 1) | {"versions": {"moe_jax": version}} for arm, version in (("b", "1.0"), ("c", "2.0"))
  )
  folders = [write(tmp_path / name, of) for name, of in (("one", [diverged, first]), ("two", [second]))]
  with pytest.raises(InputError, match=r"two: has results of moe_jax 2.0, and .*one of 1.0; train both"):
    join(folders, tmp_path / "joined", QUIET)


def test_other_code_of_a_users_metric_is_another_comparison(tmp_path):
  """In any pair of folders; one that did not measure it is none."""
  digests = [{"mine": "a" * 12}, None, {"mine": "a" * 12, "more": "c" * 12}, {"mine": "b" * 12}]
  folders = [
    write(tmp_path / str(seed), [make_result("a", seed)], **({"own_metrics": of} if of else {}))
    for seed, of in enumerate(digests)
  ]
  assert join(folders[:3], tmp_path / "joined", QUIET) == []
  assert disk.read_object(tmp_path / "joined/config.json")["own_metrics"] == digests[2]
  for order in ([0, 3], [3, 0], [1, 0, 3]):
    with pytest.raises(
      InputError, match=r"is another comparison than .*\(other code of the metric mine \[\w{12}\]"
    ):
      join([folders[i] for i in order], tmp_path / "other", QUIET)


def test_code_is_compared_where_it_is_known(tmp_path):
  of_code = lambda arm, code: make_result(arm, 1) | {"versions": {"moe_jax": "1.0"} | code}
  codes = {"one": {"code": "a" * 12}, "two": {"code": "b" * 12}, "before": {}}
  folders = {name: write(tmp_path / name, [of_code(name, code)]) for name, code in codes.items()}
  line = (
    r"two: has results of code of moe_jax with digest b{12}, and .*one of a{12}; train both with one version"
  )
  with pytest.raises(InputError, match=line):
    join([folders["one"], folders["two"]], tmp_path / "joined", QUIET)
  join([folders["one"], folders["before"]], tmp_path / "joined", QUIET)
  assert len(load_results(tmp_path / "joined")) == 2
