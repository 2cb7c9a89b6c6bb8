"""Sweeps and shards: each method at its best, chosen on other seeds, by several processes whose folders are joined."""

import csv
import dataclasses
import json
import shutil

import pytest
from rich.console import Console

from moe_jax import sharding
from moe_jax.comparison import tried
from moe_jax.comparison.arms import balancing_arm, with_arm
from moe_jax.comparison.comparison import Comparison
from moe_jax.comparison.join import join
from moe_jax.comparison.shard import Shard
from moe_jax.comparison.sweep import Sweep
from moe_jax.config import spec_text
from moe_jax.errors import InputError
from moe_jax.training import loop as train_loop
from moe_jax.training.compiled import check_run
from moe_jax.training.result_file import read_result
from tests import tiny

ARMS = {name: balancing_arm(name) for name in ("none", "switch_loss:0.1")}
CONFIG = tiny.change(
  tiny.CONFIG, num_steps=2, eval_batches=1, clip_norm=1.0, num_layers=1, balancers="none", jitter=0.0
)
WEIGHTS = Sweep.parse(["weight:0.1,0.5"], ["100"])
QUIET = Console(quiet=True)


def compare(folder, arms=ARMS, seeds=(0, 1), config=CONFIG, **arguments):
  comparison = Comparison(arms, seeds, config, folder, **arguments)
  results = comparison.run()
  comparison.report(results, title="t", question="q", command=f"c {comparison.shard}", notes=["n"])
  return results


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """The folder of two arms and two seeds, by one process."""
  folder = tmp_path_factory.mktemp("whole") / "run"
  compare(folder)
  return folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
  """The folders of the two shards of `whole`."""
  folders = [tmp_path_factory.mktemp("parts") / f"part_{i}" for i in (1, 2)]
  for i, folder in enumerate(folders, 1):
    compare(folder, shard=Shard(i, 2))
  return folders


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
  """The folder of a sweep of the weight."""
  folder = tmp_path_factory.mktemp("swept") / "run"
  compare(folder, seeds=[0], sweep=WEIGHTS)
  return folder


@pytest.fixture
def trained(monkeypatch):
  """(arm, seed) of the runs that are trained from now on."""
  found = []
  train = train_loop.Run.train

  def recorded(self):
    found.append((self.label, self.config.train.seed))
    return train(self)

  monkeypatch.setattr(train_loop.Run, "train", recorded)
  return found


def contents(folder):
  """What a folder says, by file, without what two runs of one program may differ in: time, and the command."""
  found = {}
  for path in folder.rglob("*"):
    name = path.relative_to(folder).as_posix()
    if path.name == "result.json":
      result = read_result(path)
      result["training"] = {k: v for k, v in result["training"].items() if "second" not in k}
      found[name] = result
    elif path.name in ("summary.csv", "differences.csv", "sweep.csv"):
      lines = [line for line in csv.DictReader(path.open()) if line.get("quantity") != "tokens_per_second"]
      found[name] = [{k: v for k, v in line.items() if "second" not in k} for line in lines]
    elif path.name == "config.json":
      found[name] = json.loads(path.read_text())
    elif path.suffix in (".json", ".html", ".md", ".png") and "checkpoints" not in name:
      found[name] = "exists"
  return found


@pytest.mark.parametrize("items", [0, 1, 5, 12])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_shards_are_a_partition_of_equal_parts(items, count):
  parts = [Shard.parse(f"{i}/{count}").part(range(items)) for i in range(1, count + 1)]
  assert sorted(item for part in parts for item in part) == list(range(items))
  assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_joined_shards_equal_one_process(whole, parts, tmp_path):
  for folder in parts:
    assert len(list(folder.glob("arms/*/seed_*/result.json"))) == 2
    assert not (folder / "report.html").exists()
  assert join(parts, tmp_path / "joined", QUIET) == []
  assert contents(tmp_path / "joined") == contents(whole)
  assert "c 1/2; c 2/2" in (tmp_path / "joined" / "summary.md").read_text()


def test_shards_may_share_a_folder(whole, tmp_path, trained):
  for i in (2, 1, 0):
    compare(tmp_path / "run", shard=Shard(i, 2) if i else None)
    assert len(trained) == {2: 2, 1: 4, 0: 4}[i]
  assert contents(tmp_path / "run") == contents(whole)


def test_missing_runs_are_named_and_the_joined_folder_goes_on(whole, parts, tmp_path, trained):
  joined = tmp_path / "joined"
  missing = join(parts[:1], joined, QUIET)
  assert sorted(missing) == [f"switch_loss:0.1 seed {seed}" for seed in (0, 1)]
  assert (joined / "report.html").exists()
  compare(joined)
  assert [f"{arm} seed {seed}" for arm, seed in trained] == missing
  assert contents(joined) == contents(whole)


def test_folders_that_do_not_belong_together_are_not_joined(parts, tmp_path):
  other = tmp_path / "other"

  def refused(message):
    with pytest.raises(InputError, match=message) as caught:
      join([parts[0], other], tmp_path / "joined", QUIET)
    assert "\n" not in str(caught.value) and str(other) in str(caught.value)
    assert not (tmp_path / "joined").exists()

  def changed(name, change):
    shutil.rmtree(other, ignore_errors=True)
    shutil.copytree(parts[1], other)
    for path in other.glob(name):
      value = json.loads(path.read_text())
      value.pop("digest", None)
      change(value)
      path.write_text(json.dumps(value))

  other.mkdir()
  refused("holds no comparison")
  changed("config.json", lambda claim: claim["config"]["train"].update(num_steps=4))
  refused(r"is another comparison than .*\(num_steps was 2, now 4\); join folders of one command")
  changed("config.json", lambda claim: claim["arms"]["none"].update(balancers="none [0123456789ab]"))
  refused("arm none: the code of balancers 'none' has changed")
  changed("arms/*/*/result.json", lambda result: result.update(fingerprint="0" * 64))
  refused(r"has results on other text than .* \(fingerprint 000000000000 and .*same Python version")
  changed("arms/*/*/result.json", lambda result: result["versions"].update(moe_jax="0.0.1"))
  refused("has results of moe_jax 0.0.1, and .*; train both with one version")
  changed("arms/*/*/result.json", lambda result: result.update(arm="none", seed=0))
  refused("has another result than .*, of the same run; remove one of them")
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "thesis.tex").write_text("precious")
  with pytest.raises(InputError, match="full: is not empty; choose another folder"):
    join(parts, tmp_path / "full", QUIET)


def test_a_sweep_reports_each_arm_at_its_best(swept):
  results = {
    path.parts[-3]: json.loads(path.read_text()) for path in swept.glob("sweep/arms/*/seed_100/result.json")
  }
  nll = {name: result["validation"]["nll"] for name, result in results.items()}
  best = min(nll, key=nll.get)
  assert sorted(nll) == ["switch_loss_0.1_weight=0.1", "switch_loss_0.1_weight=0.5"]
  # Only the best is trained with the seed that is reported, and the arm without a weight as it is.
  assert sorted(p.relative_to(swept / "arms").as_posix() for p in swept.glob("arms/*/*")) == sorted(
    ["none/seed_0", f"{best}/seed_0"]
  )
  lines = list(csv.DictReader((swept / "sweep.csv").open()))
  assert [(line["arm"], line["value"], line["seeds"]) for line in lines] == [
    ("none", "", ""),
    ("switch_loss:0.1", "weight=0.1", "100"),
    ("switch_loss:0.1", "weight=0.5", "100"),
  ]
  for line in lines[1:]:
    name = f"switch_loss_0.1_{line['value']}"
    assert float(line["nll"]) == nll[name] and (line["chosen"] == "True") == (name == best)
  page = (swept / "report.html").read_text().replace("<wbr>", "")
  assert "none has none of the options of the sweep" in page
  assert "chosen by nll on the selection seeds 100" in page and "weight=0.1 (nll" in page
  assert "Each arm is at its best of weight, chosen by nll on seeds 100." in page


def test_a_sweep_is_kept_and_continued(swept, tmp_path, trained):
  folder = tmp_path / "run"
  shutil.copytree(swept, folder)
  compare(folder, seeds=[0], sweep=WEIGHTS)
  assert not trained
  shutil.rmtree(folder / "sweep" / "arms" / "switch_loss_0.1_weight=0.5")
  shutil.rmtree(folder / "arms" / "none")
  compare(folder, seeds=[0], sweep=WEIGHTS)
  assert trained == [("switch_loss:0.1 weight=0.5", 100), ("none", 0)]
  assert contents(folder) == contents(swept)
  for other, message in ((Sweep.parse(["weight:0.1,0.2"], ["100"]), "weight was "), (None, "sweep was ")):
    with pytest.raises(InputError, match=f"holds a run with another configuration .*{message}"):
      Comparison(ARMS, [0], CONFIG, folder, sweep=other)


def test_a_sweep_is_split_by_arms_and_joined(swept, tmp_path):
  folders = [tmp_path / f"part_{i}" for i in (1, 2)]
  for i, folder in enumerate(folders, 1):
    compare(folder, seeds=[0], sweep=WEIGHTS, shard=Shard(i, 2))
    # In any order, in one folder or in several: the arms come as they were given.
    compare(tmp_path / "shared", seeds=[0], sweep=WEIGHTS, shard=Shard(3 - i, 2))
  compare(tmp_path / "shared", seeds=[0], sweep=WEIGHTS)
  assert contents(tmp_path / "shared") == contents(swept)
  assert join(folders[1:], tmp_path / "half", QUIET) == ["none (what the sweep would choose)"]
  assert join(folders[::-1], tmp_path / "joined", QUIET) == []
  assert contents(tmp_path / "joined") == contents(swept)
  assert "at its best of weight, chosen by nll" in (tmp_path / "joined" / "summary.md").read_text()
  with pytest.raises(InputError, match="--shard=3/3: a sweep is split by arms, and there are 2"):
    Comparison(ARMS, [0], CONFIG, tmp_path / "run", sweep=WEIGHTS, shard=Shard(3, 3))


def test_what_a_sweep_changed_is_known_of_the_arms_of_earlier_commands(tmp_path):
  """In one folder, and in two that are joined: the rates were chosen, so they are no reason not to compare."""
  rates = Sweep.parse(["learning_rate:0.000001,0.01"], ["100"])
  one, other = ({name: arm} for name, arm in ARMS.items())
  for folder, arms in (("both", one), ("both", other), ("one", one), ("other", other)):
    compare(tmp_path / folder, arms, seeds=[0], sweep=rates)
  for folders in (("one", "other"), ("other", "one")):
    joined = tmp_path / "_".join(folders)
    assert join([tmp_path / folder for folder in folders], joined, QUIET) == []
  for folder in ("both", "one_other", "other_one"):
    texts = json.loads((tmp_path / folder / "report.json").read_text())
    assert sorted(texts["swept"]["protocols"]) == sorted(
      f"{a} learning_rate={x}" for a in ARMS for x in ("0.000001", "0.01")
    )
    assert texts["notes"] == ["n"]  # what was tried is read from sweep.csv
    page = (tmp_path / folder / "report.html").read_text().replace("<wbr>", "")
    assert all(page.count(f"{arm}: chosen by nll") == 1 for arm in ARMS)
    assert "not comparable" not in (tmp_path / folder / "differences.csv").read_text()


def test_a_sweep_that_goes_on_with_more_steps_says_one_thing_of_each_arm(tmp_path):
  """In its report, and in sweep.csv. One arm stays as it was."""
  folder, config = tmp_path / "run", tiny.change(CONFIG, schedule="constant", warmup_steps=1)
  arms = {"none": ARMS["none"]} | {name: balancing_arm(name) for name in ("switch_loss:0.1", "z_loss:0.1")}
  compare(folder, arms, seeds=[0], config=config, sweep=WEIGHTS)
  del arms["z_loss:0.1"]
  longer = tiny.change(config, num_steps=3)
  # A report of before kept these sentences among its notes.
  stored = json.loads((folder / "report.json").read_text())
  stored["notes"] += ["switch_loss:0.1: chosen by nll on the selection seeds 100. Tried: weight=0.1 (...)."]
  (folder / "report.json").write_text(json.dumps(stored))
  compare(folder, arms, seeds=[0], config=longer, sweep=WEIGHTS)
  lines = list(csv.DictReader((folder / "sweep.csv").open()))
  steps = {line["arm"]: line["num_steps"] for line in lines}
  assert steps == {"none": "", "switch_loss:0.1": "3", "z_loss:0.1": "2"} and len(lines) == 5
  page = (folder / "report.html").read_text().replace("<wbr>", "")
  for arm, n in (("switch_loss:0.1", 3), ("z_loss:0.1", 2)):
    assert (
      page.count(f"{arm}: chosen by nll on the selection seeds 100, after {n} steps. Tried: weight=0.1 (")
      == 1
    )
    assert page.count(f"{arm}: chosen by") == 1
  assert page.count("has none of the options of the sweep") == 1


def test_a_sweep_csv_of_before_or_with_damaged_lines_is_read(tmp_path):
  whole = "a,weight=1,100,2.5,0.5,nll,True,"
  lines = [
    "arm,value,seeds,nll,max_vio,goal,chosen,note",
    whole,
    "a,weight=2,100,2.x,0.5,nll,False,",
    "a,wei",
  ]
  (tmp_path / "sweep.csv").write_text("\n".join([*lines, "b,,,,,nll,True,none"]))
  (of_a, of_b) = tried.read_tried(tmp_path / "sweep.csv")
  assert tried.tried_in_words([of_a, of_b]) == [
    "a: chosen by nll on the selection seeds 100. Tried: weight=1 (nll 2.5000, MaxVio 0.500, chosen).",
    "b has none of the options of the sweep, and is trained as it is.",
  ]
  tried.write_tried(tmp_path / "sweep.csv", [of_b | {"num_steps": 3, "more": 1}])
  assert [line["num_steps"] for line in tried.read_tried(tmp_path / "sweep.csv")] == ["", "3"]


def result(name, nll, seed=100, **more):
  return {"arm": name, "seed": seed, "validation": {"nll": nll, "max_vio": [1 / float(nll)]}} | more


def test_the_best_mean_is_chosen_and_a_diverged_run_never():
  sweep = Sweep.parse(["learning_rate:1,2,3"], ["100", "101"])
  config = check_run(CONFIG, sharding.make_mesh(CONFIG.mesh))
  tried = sweep.candidates({"a": config})
  names = [c.name for c in tried["a"]]
  assert [c.fields for c in tried["a"]] == [{"learning_rate": x} for x in (1.0, 2.0, 3.0)]

  def chosen(nlls, goal="nll"):
    results = [result(n, x, seed) for n, xs in zip(names, nlls) for seed, x in zip((100, 101), xs)]
    results = [
      r | ({"diverged": "at step 1"} if r["validation"]["nll"] == "Infinity" else {}) for r in results
    ]
    best, lines = dataclasses.replace(sweep, goal=goal).choose(tried, results)
    return names.index(best["a"].name), [line["note"] for line in lines]

  assert chosen([(2, 2), (1, 2), (2, 1.5)]) == (1, ["", "", ""])
  assert chosen([(1, 2), (1, 2), (2, 1)]) == (0, ["at the end of what was tried of learning_rate", "", ""])
  assert chosen([(2, 2), (2, 2), (1, "Infinity")]) == (0, [
    "at the end of what was tried of learning_rate", "", "diverged with seed 101"])  # fmt: skip
  assert chosen([(2, 2), (1, 1), (3, 3)], goal="max_vio")[0] == 2
  # The ends are those of the values, in whatever order they are given.
  for texts, best, at_the_end in (("2,3,1", "2", False), ("1,3,2", "3", True)):
    unordered = Sweep.parse([f"learning_rate:{texts}"], ["100"])
    candidates = unordered.candidates({"a": config})
    results = [result(c.name, 1 + (c.values["learning_rate"] != best), 100) for c in candidates["a"]]
    assert any(line["note"] for line in unordered.choose(candidates, results)[1]) == at_the_end
  with pytest.raises(InputError, match="arm a diverged with every value that was tried"):
    chosen([("Infinity", 1)] * 3)


@pytest.mark.parametrize(
  ("goal", "fields", "message"),
  [
    ("max_vio", {}, "arm dense has no max_vio; leave the arm out or choose another goal"),
    ("dropped_fraction_training", {}, "arm dense has no dropped_fraction_training"),
    ("excess_nll", {"objective": "masked_lm"}, "arm none has no excess_nll"),
  ],
)
def test_a_goal_that_an_arm_lacks_is_one_line_before_any_training(tmp_path, trained, goal, fields, message):
  arms = {"none": ARMS["none"], "dense": {"balancers": "none", "num_experts": 1, "num_experts_per_token": 1}}
  asked = Sweep.parse(["learning_rate:0.001,0.01"], ["100"], goal)
  with pytest.raises(InputError, match=f"^--sweep_goal={goal}: {message}"):
    compare(tmp_path / "run", arms, seeds=[0], config=tiny.change(CONFIG, **fields), sweep=asked)
  assert trained == [] and not (tmp_path / "run").exists()


def test_a_run_that_diverges_counts_as_tried(tmp_path):
  sweep = Sweep.parse(["learning_rate:0.001,1e30"], ["100"])
  (one,) = compare(tmp_path / "run", arms={"none": ARMS["none"]}, seeds=[0], sweep=sweep)
  assert one["arm"] == "none learning_rate=0.001"
  lines = list(csv.DictReader((tmp_path / "run" / "sweep.csv").open()))
  assert [(line["nll"] == "inf", line["note"].split(" with")[0]) for line in lines] == [
    (False, "at the end of what was tried of learning_rate"),
    (True, "diverged"),
  ]


def test_combinations_of_a_field_and_options_of_the_methods_that_have_them():
  both = {"a": balancing_arm("switch_loss:0.1+z_loss:0.01"), "b": balancing_arm("loss_free_bias:0.01")}
  configs = {n: check_run(with_arm(CONFIG, arm), sharding.make_mesh(CONFIG.mesh)) for n, arm in both.items()}
  texts = ["z_loss.weight:1,2", "rate:3,4", "switch_loss.weight:5,6"]
  tried = Sweep.parse(texts, ["100"]).candidates(configs)
  balancers = {arm: [spec_text(c.fields["balancers"]) for c in of] for arm, of in tried.items()}
  assert balancers["a"] == [f"switch_loss:{x}.0,z_loss:{y}.0" for y in (1, 2) for x in (5, 6)]
  assert balancers["b"] == ["loss_free_bias:3.0", "loss_free_bias:4.0"]
  assert tried["a"][1].name == "a z_loss.weight=1 switch_loss.weight=6"


@pytest.mark.parametrize(
  ("texts", "fields", "message"),
  [
    (["learning_rat:1,2"], {}, "--sweep=learning_rat:1,2: unknown field, .*: did you mean learning_rate"),
    (["wieght:1,2"], {}, "did you mean weight"),
    (["causal:1,2"], {}, "unknown field, and option of these arms 'causal'"),
    (["threshold:1,2"], {}, "unknown field, and option of these arms 'threshold'"),
    (["weight"], {}, "--sweep=weight: must be a field and two or more different values"),
    (["weight:1"], {}, "must be a field and two or more different values"),
    (["weight:1,1"], {}, "must be a field and two or more different values"),
    (["weight:1,2", "weight:1,2"], {}, "must be a field and two or more different values"),
    (["weight:1,two"], {}, "--sweep=weight:1,two: 'switch_loss': weight must be float, got 'two'"),
    (["learning_rate:1,two"], {}, "--sweep=learning_rate:1,two: .*learning_rate must be float, got 'two'"),
    (["learning_rate:1,-1"], {}, "--learning_rate=-1.0: must be above 0"),
    (["weight:1,2"], {"balancers": "switch_loss+z_loss"}, "has switch_loss.weight and z_loss.weight; say one"),
    (["capacity_factor:1,2"], {"dispatcher": "dropless"}, "arm none ignores capacity_factor: --dispatcher=dropless"),
    (["jitter:0.1,0.2"], {"ffn": "soft_moe", "objective": "masked_lm"}, "ignores jitter: --ffn=soft_moe does not"),
    (["dense_dim:8,16"], {}, "arm none ignores dense_dim: none of attention.* reads it"),
    (["final_learning_rate_fraction:0,1"], {"schedule": "constant"}, "--schedule=constant does not decay"),
    (["sequence_length:8,16"], {}, "sequence_length cannot be chosen by a result"),
    (["seed:8,16"], {}, "seed cannot be chosen by a result"),
  ],
)  # fmt: skip
def test_a_wrong_sweep_is_one_line_before_anything_is_written(tmp_path, texts, fields, message):
  balancers = fields.pop("balancers", "switch_loss")
  arms = {"none": {"balancers": "none"}, "one": {"balancers": balancers}}
  if "ffn" in fields:
    arms.pop("one")
  with pytest.raises(InputError, match=message) as caught:
    sweep = Sweep.parse(texts, ["100"])
    Comparison(arms, [0], tiny.change(CONFIG, **fields), tmp_path / "run", sweep=sweep)
  assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_wrong_seeds_goals_and_shards_are_one_line(tmp_path):
  run = lambda sweep: Comparison(ARMS, [0], CONFIG, tmp_path / "run", sweep=sweep)
  for make, message in (
    (lambda: run(Sweep.parse(["weight:1,2"], ["0", "100"])), "--sweep_seeds=0,100: 0 is reported, too"),
    (lambda: Sweep.parse(["weight:1,2"], ["a"]), "--sweep_seeds=a: must be different whole numbers"),
    (
      lambda: run(Sweep.parse(["weight:1,2"], ["100"], "nlll")),
      "unknown --sweep_goal 'nlll': did you mean nll",
    ),
    *((lambda t=t: Shard.parse(t), f"--shard={t}: must be i/n") for t in ("0/2", "3/2", "1", "a/b", "1/0")),
  ):
    with pytest.raises(InputError, match=message):
      make()


def test_an_arm_may_have_batches_of_its_own_and_no_text_of_its_own(tmp_path):
  (result,) = Comparison({"a": {"batch_size": 4}}, [0], CONFIG, tmp_path / "run").run()
  assert result["tokens_per_step"] == 4 * CONFIG.data.sequence_length
  with pytest.raises(InputError, match="arm b: reads other text or tokens than the comparison"):
    Comparison({"b": {"markov_states": 16}}, [0], CONFIG, tmp_path / "other").run()
  assert not (tmp_path / "other").exists()
