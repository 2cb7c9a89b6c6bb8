"""A run loaded back, and what is said of a folder that cannot be loaded or continued."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

import moe_jax
from moe_jax.data import Dataset, load_dataset
from moe_jax.data.bpe import load_bpe, train_bpe
from moe_jax.errors import InputError
from moe_jax.training.identity import write_identity
from moe_jax.training.loop import Run
from tests import tiny
from tests.training.test_loop import KeepsState

CONFIG = tiny.change(tiny.CONFIG, num_steps=2, eval_batches=1, num_layers=1, hooks="average_parameters")


@pytest.fixture(scope="module")
def dataset():
  return load_dataset(CONFIG.data)


@pytest.fixture(scope="module")
def trained_run(dataset, tmp_path_factory):
  run = KeepsState(CONFIG, dataset, tmp_path_factory.mktemp("trained"))
  run.train()
  return run


def test_a_loaded_run_is_the_trained_model(trained_run):
  run = trained_run
  loaded = moe_jax.load(run.folder)  # which is Run.load, for the folder of a run
  assert (loaded.config.to_dict(), loaded.step) == (run.config.to_dict(), 2)
  num_params = sum(x.size for x in jax.tree.leaves(run.state.params))
  assert repr(loaded) == f"<Loaded Transformer from {run.folder}, step 2: {num_params:,} parameters>"
  with pytest.raises(InputError, match="dtype=bfloat16 is for published checkpoints"):
    moe_jax.load(run.folder, dtype="bfloat16")
  assert loaded.tokenizer.decode(loaded.tokenizer.encode("héllo")) == "héllo"
  tokens_BL = tiny.make_batch()["tokens_BL"]
  trained = nnx.merge(nnx.graphdef(run.steps.model), run.state.params, run.state.variables)
  np.testing.assert_array_equal(loaded.model(tokens_BL)[0], trained(tokens_BL)[0])
  for kept, found in zip(*(jax.tree.leaves(nnx.state(m)) for m in (trained, loaded.model)), strict=True):
    np.testing.assert_array_equal(kept, found)


def test_a_trained_tokenizer_is_loaded_from_the_folder_of_the_run(trained_run, tmp_path):
  folder, content = tmp_path / "run", train_bpe(["abc abc"], 264)
  shutil.copytree(trained_run.folder, folder)
  values = json.loads((folder / "config.json").read_text())
  values["data"] |= {"dataset": "stdlib", "tokenizer": "bpe:264"}
  (folder / "config.json").write_text(json.dumps(values))
  with pytest.raises(
    InputError, match=r"run: tokenizer.json is missing; copy it from another run of .*=bpe:264"
  ):
    Run.load(folder)
  config = tiny.change(CONFIG, dataset="stdlib", tokenizer="bpe:264")
  dataset = Dataset(config.data, load_dataset(CONFIG.data).info, None, None, load_bpe(content))
  write_identity(folder, Run(config, dataset, folder).config, dataset)
  assert (
    Run.load(folder).tokenizer.encode("abc").tolist() == load_bpe(content).encode("abc").tolist() == [257]
  )


def test_what_cannot_be_loaded_is_said_in_one_line(trained_run, tmp_path):
  folder = trained_run.folder
  values = json.loads((folder / "config.json").read_text())
  (tmp_path / "whole").mkdir()

  def refused(match, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=match) as error:
      Run.load(tmp_path)
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)

  with pytest.raises(InputError, match=r"whole: holds no run \(config.json is missing or not whole"):
    Run.load(tmp_path / "whole")
  (tmp_path / "result.json").write_text("{}")
  with pytest.raises(InputError, match=f"result.json: is a file; give the folder that it is in: {tmp_path}$"):
    Run.load(tmp_path / "result.json")
  refused("holds no run", json.dumps(values)[:-9])
  refused("is no folder of a run; in a comparison's folder, a run is arms/ARM", json.dumps({"seeds": [0]}))
  refused("has no checkpoint yet", json.dumps(values))
  values["model"]["moe"]["router"] = "mine:temperature=2"
  refused("--router=mine.*unknown router 'mine'.*moe_jax.register, or --plugins=FILE", json.dumps(values))
  values["model"]["moe"]["top_k"] = 2
  refused("MoEConfig has no field top_k in this version", json.dumps(values))
  del values["model"]["moe"]
  refused("config.json is no configuration of this version", json.dumps(values))
  for field in ({"model_type": "mixtral"}, {"architectures": ["MixtralForCausalLM"]}):
    published = "is a published checkpoint, and this takes the folder of a run; .*save_model makes one of"
    refused(published, json.dumps({"vocab_size": 48, "hidden_size": 16} | field))


@pytest.mark.parametrize("fields", [{"model_dim": 32}, {"hooks": ""}], ids=["shapes", "structure"])
def test_a_checkpoint_of_other_arrays_is_refused_in_one_line(fields, trained_run, dataset, tmp_path):
  folder = trained_run.folder
  shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
  other = Run(tiny.change(CONFIG, **fields), dataset, tmp_path)
  line = (
    re.escape(f"{tmp_path}/checkpoints/2: a checkpoint of another configuration or version of moe_jax")
    + " .*"
  )
  with pytest.raises(InputError, match=r"holds a run with another configuration \((model_dim|hooks) was "):
    other.train()
  assert (tmp_path / "config.json").read_text() == (folder / "config.json").read_text()
  write_identity(tmp_path, other.config, dataset)
  with pytest.raises(InputError, match=line):
    other.train()
  with pytest.raises(InputError, match=line) as error:
    Run.load(tmp_path)
  assert "\n" not in str(error.value)
