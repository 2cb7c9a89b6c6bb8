"""Two real processes that read models: the same files give the numbers of one process, others are refused in one line."""

import json
import re

import numpy as np
import pytest
from flax import nnx

from moe_jax.data import load_dataset
from moe_jax.models import preset
from moe_jax.training.compiled import make_model, resolve_config
from moe_jax.training.digests import tree_digest
from moe_jax.training.loop import Run
from moe_jax.training.metric_writer import read_jsonl
from moe_jax.training.start import save_model
from tests import tiny
from tests.cluster.test_two_processes import BOTH, FIELDS, SLOW, Pair

OWN = FIELDS | {"num_steps": 3, "checkpoint_every": 0, "balancers": "none", "tokenizer": "bytes"}
CONFIG = tiny.change(preset("default"), **OWN, mesh=BOTH)
DISTIL = "distil:teacher={}:temperature=2:soft=0.5"
# Each process is in a folder of its own, as hosts with disks of their own are. `other` is another model in each.
CHILD = """
import json, os, pathlib
from moe_jax import cli
from moe_jax.cluster import start as distributed
distributed.define_flags()
base, fields = pathlib.Path("BASE"), json.loads('FIELDS')
def main(argv):
  import jax
  from flax import nnx
  import moe_jax
  from moe_jax.config import MeshConfig
  from moe_jax.data import load_dataset
  from moe_jax.errors import InputError
  from moe_jax.models import preset
  from moe_jax.plugins import import_plugins
  from moe_jax.training import reading
  from moe_jax.training.digests import tree_digest
  from moe_jax.training.loop import Run
  from tests import tiny
  own, said = jax.process_index(), {}
  os.chdir(base / str(own))
  config = tiny.change(preset("default"), **fields, mesh=MeshConfig(data=4, expert=2))
  dataset = load_dataset(config.data)
  train = lambda name, **changes: Run(tiny.change(config, **changes), dataset, base / name).train()

  def refused(name, do, *args, **changes):
    try:
      do(*args, **changes)
    except InputError as error:
      said[name] = str(error)

  said["digest"] = tree_digest(nnx.state(moe_jax.load(base / "model").model, nnx.Param))
  refused("load", moe_jax.load, "other")
  refused("start", train, "start", init_from="other")
  refused("distilled", train, "distilled", objective="DISTIL".format("other"))
  import_plugins(["plugin.py"])
  refused("plugin", train, "plugin", objective="own")
  differing = reading.differing
  if own:
    reading.differing = lambda *args: "one is"
  refused("damaged", moe_jax.load, base / "model")
  reading.differing = differing
  train("trained", init_from=str(base / "model"), objective="DISTIL".format(base / "teacher"))
  print("said", json.dumps(said), flush=True)
cli.run(distributed.on_every_process(main))
"""
PLUGIN = """
import moe_jax
from moe_jax.training.objectives import NextToken
class Own(NextToken):
  def token_losses(self, logits_BLV, targets_BL):
    return {} * super().token_losses(logits_BLV, targets_BL)
moe_jax.register("objective", "own", Own)
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  """The folders that the processes read."""
  folder = tmp_path_factory.mktemp("base")
  models = {"model": 0, "teacher": 1, "0/other": 2, "1/other": 3}
  for name, seed in models.items():
    save_model(folder / name, make_model(resolve_config(CONFIG), tiny.VOCAB, seed=seed), CONFIG)
  for own in (0, 1):
    (folder / str(own) / "plugin.py").write_text(PLUGIN.format(own + 1))
  return folder


@pytest.fixture(scope="module")
def said(base):
  """What each of the two processes has printed."""
  replaced = {"BASE": str(base), "FIELDS": json.dumps(OWN), "DISTIL": DISTIL}
  script = base / "child.py"
  script.write_text(re.sub("BASE|FIELDS|DISTIL", lambda found: replaced[found[0]], CHILD))
  with Pair([str(script), "--heartbeat_timeout=60"], base) as pair:
    statuses = [pair.ends(i, SLOW) for i in (0, 1)]
    outputs = [pair.output(i) for i in (0, 1)]
  assert statuses == [0, 0], outputs
  return [json.loads(re.search("(?m)^said (.*)$", output)[1]) for output in outputs]


def test_every_process_loads_the_whole_model(said, base):
  model = make_model(resolve_config(CONFIG), tiny.VOCAB, seed=0)
  assert [of["digest"] for of in said] == [tree_digest(nnx.state(model, nnx.Param))] * 2


@pytest.mark.parametrize("name", ["load", "start", "distilled"])
def test_other_files_in_one_process_are_refused_in_all(said, base, name):
  right = (
    r"digest of what was saved: process 1 has '\w+', process 0 '\w+'; all processes must read the same files"
  )
  begins = "--init_from=other: " if name == "start" else ""
  for own in (0, 1):
    assert re.fullmatch(rf"{begins}{base}/{own}/other/checkpoints/0: {right}", said[own][name])
  assert not (base / name / "config.json").exists()


def test_other_code_in_one_process_is_refused_in_all(said, base):
  line = (
    r"--plugins: own code: process 1 has \['own \[\w+\]'\], process 0 \['own \[\w+\]'\]; .* the same files"
  )
  assert all(re.fullmatch(line, of["plugin"]) for of in said)
  assert not (base / "plugin/config.json").exists()


def test_arrays_that_are_damaged_in_one_process_are_passed_over_in_all(said):
  assert all(
    "no checkpoint is whole: the checkpoint of step 0 is damaged (one is)" in of["damaged"] for of in said
  )


def test_two_processes_train_from_a_model_and_a_teacher_as_one_does(said, base, tmp_path):
  config = tiny.change(CONFIG, init_from=str(base / "model"), objective=DISTIL.format(base / "teacher"))
  Run(config, load_dataset(config.data), tmp_path).train()
  losses = [[line["loss"] for line in read_jsonl(f / "metrics.jsonl")] for f in (tmp_path, base / "trained")]
  assert len(losses[0]) == 3
  np.testing.assert_allclose(losses[1], losses[0], rtol=2e-5)
