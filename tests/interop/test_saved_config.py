"""What a saved config.json says beside what the model computes: its balancers, its positions, and the files around it."""

import dataclasses
import json
import logging

import jax
import numpy as np
import pytest
from flax import nnx

import moe_jax
from moe_jax import adapt
from moe_jax.config import BlockConfig, ModelConfig, Segment
from moe_jax.errors import InputError
from moe_jax.interop.describe import balancers_line, describe, dropping_line
from moe_jax.interop.families import FAMILIES, Values
from moe_jax.interop.families.fields import layers_of
from moe_jax.interop.folder import read_config
from moe_jax.interop.safetensors import open_file
from moe_jax.models import PRESETS
from moe_jax.nn.build import resolve
from moe_jax.nn.variables import BalancerState
from moe_jax.training.load import Loaded
from tests.interop.helpers import MIXTRAL, random_model
from tests.interop.test_families import CASES

OURS = ("quick", "default", "long", "tiny", "gshard", "switch")  # presets of no family
TINY = [name for name in PRESETS if name.endswith("_tiny") and not name.startswith(OURS)]
# preset -> what its config.json cannot hold
LOST = {
  "deepseek_v2_tiny": "device_loss,communication_loss:devices=4:devices_per_token=2",
  "olmoe_1b_7b_tiny": "z_loss:7.8125e-06",
}


def balancers_of(config) -> set[str]:
  return {str(part) for block in layers_of(config) if str(block.ffn) == "moe" for part in block.moe.balancers}


def round_trip(config):
  """What a config.json makes of the balancers, and the line about those that it does not hold."""
  config = resolve(config)
  family, values = describe(config, 264)
  read = family.read(Values("config.json", json.loads(json.dumps(values))))
  return balancers_of(resolve(read)), balancers_line(config, family, values)


@pytest.mark.parametrize("name", TINY)
def test_balancers_come_back_or_are_named(name):
  config = PRESETS[name].model
  ours, lost = balancers_of(resolve(config)), LOST.get(name, "")
  read, line = round_trip(config)
  assert read == ours - set(lost.split(","))
  assert (f" cannot hold balancers={lost}, and is loaded with balancers=" in line) == bool(lost)
  given = ",".join(map(str, resolve(config).moe.balancers))
  assert f"use --balancers={given} (" in line if lost else line == ""


def with_balancers(config, text: str):
  return dataclasses.replace(config, moe=dataclasses.replace(config.moe, balancers=text))


@pytest.mark.parametrize("name", ["mixtral_8x7b_tiny", "qwen3_30b_a3b_tiny", "olmoe_1b_7b_tiny"])
def test_weights_are_exact_to_fifteen_digits(name):
  """Also such as come from a division, which a factor of 3 / 2 or 2 / 3 does not give back bit by bit."""
  config = PRESETS[name].model
  for weight in (0.02, 0.000625, 0.0123456789012345, 1e-9, 7.0):
    assert round_trip(with_balancers(config, f"switch_loss:{weight}")) == ({f"switch_loss:{weight}"}, "")
  read, line = round_trip(with_balancers(config, f"switch_loss:{1 / 3}"))
  np.testing.assert_allclose(float(read.pop().split(":")[1]), 1 / 3, rtol=1e-14)
  assert line == ""


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "gpt_oss", "minimax"])
@pytest.mark.parametrize("coefficient", [0.02, 0.001, 0.9, 0.00123457, 0.00123456789, 1])
def test_the_coefficient_of_a_checkpoint_is_written_as_it_was(name, coefficient):
  """Of three layers with two experts per token, so that the weight is 2 / 3 of it."""
  family, values = FAMILIES[name], CASES[name][0] | {"num_hidden_layers": 3, "layer_types": None}
  values["router_aux_loss_coef"] = coefficient
  config = resolve(family.read(Values("config.json", values)))
  assert family.write(config)["router_aux_loss_coef"] == coefficient


@pytest.mark.parametrize("name", ["deepseek", "deepseek_v2"])
@pytest.mark.parametrize(
  "fields", [{"aux_loss_alpha": 0.001, "seq_aux": True}, {"aux_loss_alpha": 1 / 3, "seq_aux": False}]
)
def test_the_alpha_of_a_checkpoint_is_written_as_it_was(name, fields):
  family = FAMILIES[name]
  config = resolve(family.read(Values("config.json", CASES[name][0] | fields)))
  assert family.write(config).items() >= fields.items()


@pytest.mark.parametrize(
  ("balancers", "held", "line"),
  [
    ("switch_loss:0.1:scope=sequence", "switch_loss:0.1", "balancers=switch_loss:0.1:scope=sequence, and is"),
    (
      "switch_loss:0.2:scope=group,switch_loss:0.1",
      "switch_loss:0.1",
      "balancers=switch_loss:0.2:scope=group, ",
    ),
    (
      "z_loss",
      "none",
      "balancers=z_loss, and is loaded with balancers=none; to continue this training, use ",
    ),
    ("none", "none", ""),
  ],
)
def test_what_is_not_held_is_named(balancers, held, line):
  found, said = round_trip(with_balancers(MIXTRAL, balancers))
  assert found == {held} and line in said and bool(said) == bool(line)


def test_saving_warns_once_and_the_new_weight_is_written(tmp_path, caplog):
  """A checkpoint keeps what only transformers reads of its config.json, but not the weight that it had."""
  values = CASES["deepseek"][0] | {"aux_loss_alpha": 0.001, "seq_aux": True, "ep_size": 1}
  moe_jax.save(random_model(FAMILIES["deepseek"].read(Values("config.json", values)), 24), tmp_path / "one")
  (tmp_path / "one/config.json").write_text(json.dumps(values | {"model_type": "deepseek"}))
  loaded = moe_jax.load(tmp_path / "one")
  assert not caplog.records
  changed = adapt.change_moe(loaded.model, balancers="switch_loss:0.5,z_loss")
  moe_jax.save(loaded._replace(model=changed), tmp_path / "two")
  found = read_config(tmp_path / "two/config.json")
  assert (found["aux_loss_alpha"], found["seq_aux"], found["ep_size"]) == (0.5, False, 1)
  assert balancers_of(moe_jax.load(tmp_path / "two").config.model) == {"switch_loss:0.5"}
  (record,) = caplog.records
  assert record.levelno == logging.WARNING and "cannot hold balancers=z_loss, " in record.getMessage()


CAPACITY = "--capacity_factor=1.25 --eval_capacity_factor=0.5"


@pytest.mark.parametrize(
  ("fields", "flags"),
  [
    ({}, ""),
    ({"dispatcher": "all_to_all:capacity=none"}, ""),
    ({"dispatcher": "sorted"}, f"--dispatcher=sorted {CAPACITY}"),
    (
      {"dispatcher": "einsum", "group_size": 8, "jitter": 0.1},
      f"--dispatcher=einsum {CAPACITY} --group_size=8 --jitter=0.1",
    ),
    ({"jitter": 0.1}, "--jitter=0.1"),
  ],
)
def test_dropped_tokens_and_noise_are_named(fields, flags):
  moe = dataclasses.replace(MIXTRAL.moe, eval_capacity_factor=0.5, **fields)
  line = dropping_line(resolve(dataclasses.replace(MIXTRAL, moe=moe)), FAMILIES["mixtral"])
  assert (f"before, use {flags} (in code" in line) if flags else line == ""
  assert ("no token is dropped" in line) == ("--dispatcher" in flags)
  assert ("no noise" in line) == ("--jitter" in flags)


def test_layers_that_drop_differently_are_named_together():
  moes = [dataclasses.replace(MIXTRAL.moe, jitter=jitter) for jitter in (0.1, 0.0)]
  segments = (Segment(tuple(BlockConfig("attention", moe=moe) for moe in moes)),)
  config = dataclasses.replace(MIXTRAL, num_layers=ModelConfig().num_layers, segments=segments)
  assert "use what its layers have (--jitter=0.1; nothing) (" in dropping_line(
    resolve(config), FAMILIES["mixtral"]
  )


def test_saving_a_model_that_drops_tokens_warns_and_the_flags_bring_it_back(tmp_path, caplog):
  moe = dataclasses.replace(MIXTRAL.moe, dispatcher="sorted", eval_capacity_factor=0.5)
  model = random_model(resolve(dataclasses.replace(MIXTRAL, moe=moe)))
  moe_jax.save(model, tmp_path / "one")
  (record,) = caplog.records
  assert f"use --dispatcher=sorted {CAPACITY} (" in record.getMessage()
  loaded, tokens_BL = moe_jax.load(tmp_path / "one").model, np.arange(32).reshape(2, 16)
  again = adapt.change_moe(loaded, dispatcher="sorted", eval_capacity_factor=0.5)
  logits = [np.asarray(m(tokens_BL)[0]) for m in (model, again, loaded)]
  np.testing.assert_allclose(logits[1], logits[0], rtol=1e-5, atol=1e-5)
  assert np.abs(logits[2] - logits[0]).max() > 1e-2


def test_balancers_of_layers_that_differ_are_named_together():
  moes = [dataclasses.replace(MIXTRAL.moe, balancers=text) for text in ("switch_loss:0.02", "z_loss")]
  segments = (Segment(tuple(BlockConfig("attention", moe=moe) for moe in moes)),)
  config = dataclasses.replace(MIXTRAL, num_layers=ModelConfig().num_layers, segments=segments)
  _, line = round_trip(config)
  assert "cannot hold balancers=z_loss, " in line
  assert "use the balancers of its layers (switch_loss:0.02; z_loss) (" in line


def test_a_family_with_a_bias_gets_one_of_zeros_from_a_model_without(tmp_path):
  """As in a comparison with and without it. The bias of V2 has no tensor."""
  config = FAMILIES["deepseek_v3"].read(Values("config.json", CASES["deepseek_v3"][0]))
  moe_jax.save(random_model(with_balancers(config, "none"), 24), tmp_path / "v3")
  bias = open_file(tmp_path / "v3/model.safetensors")["model.layers.1.mlp.gate.e_score_correction_bias"]
  assert bias.dtype == np.float32 and bias.shape == (4,) and not bias.any()
  model = moe_jax.load(tmp_path / "v3").model
  assert not any(x.any() for x in jax.tree.leaves(nnx.state(model, BalancerState)))
  v2 = FAMILIES["deepseek_v2"].read(Values("config.json", CASES["deepseek_v2"][0]))
  with pytest.raises(InputError, match=r"no tensor for ffn.balancer_state \[1, 4\]"):
    moe_jax.save(random_model(with_balancers(v2, "loss_free_bias"), 24), tmp_path / "v2")


def test_positions_are_written(tmp_path):
  """Of a checkpoint, as they were; of YaRN, its factor times the length before; of a run, the length of its texts."""
  run = dataclasses.replace(moe_jax.Config(), model=MIXTRAL)
  (tmp_path / "config.json").write_text(json.dumps(run.to_dict() | {"vocab_size": 48, "domains": []}))
  tokenizer = moe_jax.data.tokenizers.load_tokenizer("bytes")._replace(bos_id=1, pad_id=0, fingerprint="own")
  yarn = FAMILIES["deepseek_v3"].read(Values("config.json", CASES["deepseek_v3"][0]))
  cases = {
    "plain": (random_model(MIXTRAL), 0),
    "run": (Loaded(random_model(MIXTRAL), run, tokenizer, 3, tmp_path, max_positions=32), 32),
    "yarn": (random_model(yarn, 24), 40 * 8),
    "yarn_run": (Loaded(random_model(yarn, 48), run, tokenizer, 3, tmp_path, max_positions=32), 40 * 8),
  }
  for name, (model, positions) in cases.items():
    moe_jax.save(model, tmp_path / name)
    loaded = moe_jax.load(tmp_path / name)
    assert loaded.max_positions == positions, name
    assert ("max_position_embeddings" in read_config(tmp_path / name / "config.json")) == bool(positions)
  path = tmp_path / "yarn/config.json"
  path.write_text(json.dumps(read_config(path) | {"max_position_embeddings": 100}))
  moe_jax.save(moe_jax.load(tmp_path / "yarn"), tmp_path / "again")
  assert read_config(tmp_path / "again/config.json")["max_position_embeddings"] == 100


FILES = (
  "tiktoken.model",
  "tokenization_kimi.py",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "vocab.json",
)
FILES += ("merges.txt", "added_tokens.json", "chat_template.jinja", "configuration_x.py", "modeling_x.py")


def test_files_around_the_weights_are_copied(tmp_path):
  """None of them is read or run here. One that cannot be read is named, and how to make one that can."""
  moe_jax.save(random_model(MIXTRAL), tmp_path / "one")
  for name in (*FILES, "setup.py", "README.md"):
    (tmp_path / "one" / name).write_text(name)
  loaded = moe_jax.load(tmp_path / "one")
  moe_jax.save(loaded, tmp_path / "two")
  found = {
    path.name: path.read_text() for path in (tmp_path / "two").iterdir() if path.suffix != ".safetensors"
  }
  assert found.keys() == {*FILES, "config.json"} and all(found[name] == name for name in FILES)
  with pytest.raises(
    InputError, match=r"two: has no tokenizer .*tiktoken.model, .* convert_tiktoken_to_fast"
  ):
    moe_jax.generate(moe_jax.load(tmp_path / "two"), "a")
  (tmp_path / "two/tiktoken.model").unlink()
  with pytest.raises(InputError, match=r"two: has no tokenizer .* AutoTokenizer.*save_pretrained"):
    moe_jax.generate(moe_jax.load(tmp_path / "two"), "a")
