"""What cannot be loaded or saved is said in one line that says what is wrong and what would be right."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest

import moe_jax
from moe_jax.errors import InputError
from moe_jax.interop import memory
from moe_jax.interop.families import Values
from moe_jax.interop.folder import read_config
from moe_jax.interop.load import read_model_config
from moe_jax.interop.numbers import read_numbers
from moe_jax.interop.safetensors import Pending, open_file, write_file
from tests.interop.helpers import MIXTRAL, random_model


@pytest.fixture(scope="module")
def model():
  return random_model(MIXTRAL)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
  """The same checkpoint in one file, and in several."""
  folder = tmp_path_factory.mktemp("saved")
  moe_jax.save(model, folder / "one")
  moe_jax.save(model, folder / "several", shard_bytes=10_000)
  return folder


@pytest.fixture
def folder(saved, tmp_path):
  shutil.copytree(saved / "one", tmp_path, dirs_exist_ok=True)
  return tmp_path


def refused(folder, match, **options):
  with pytest.raises(InputError, match=match) as error:
    moe_jax.load(folder, **options)
  assert "\n" not in str(error.value) and str(error.value).startswith((str(folder), "load:"))


def change_config(folder, **fields):
  values = json.loads((folder / "config.json").read_text()) | fields
  (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def change_tensors(folder, change):
  """Rewrites the file with `change(name -> array)`."""
  tensors = {name: np.array(x) for name, x in open_file(folder / "model.safetensors").items()}
  change(tensors)
  pending = {name: Pending(x.shape, x.dtype, lambda x=x: x) for name, x in tensors.items()}
  write_file(folder / "model.safetensors", pending)


def test_folders_without_a_model(folder):
  refused(folder / "elsewhere", "no such folder")
  refused(folder / "config.json", f"config.json: is a file; give the folder that it is in: {folder}$")
  (folder / "empty").mkdir()
  refused(folder / "empty", r"holds no model \(config.json is missing\)")
  (folder / "model.safetensors").unlink()
  refused(folder, r"holds no weights \(model.safetensors or model.safetensors.index.json\)$")
  (folder / "pytorch_model.bin").touch()
  refused(folder, "it has PyTorch files, which are not read: save it again with transformers")
  (folder / "config.json").write_text('{"model_type"')
  refused(folder, r"config.json: is not JSON \(")
  (folder / "config.json").write_text("[]")
  refused(folder, "config.json: is no configuration")


def test_models_that_are_not_known(folder):
  change_config(folder, model_type="mixtrall")
  refused(folder, "config.json: unknown model_type 'mixtrall': did you mean mixtral.*known: ")
  change_config(folder, model_type=None, architectures=["MixtralForSpeech"])
  refused(folder, r"unknown architectures 'MixtralForSpeech': .*known: ")
  change_config(folder, architectures=["MixtralForCausalLMM"])
  refused(folder, r"unknown architectures 'MixtralForCausalLMM': did you mean MixtralForCausalLM\b")
  change_config(folder, architectures=["MixtralForCausalLM"])
  moe_jax.load(folder)


@pytest.mark.parametrize(
  ("fields", "match"),
  [
    ({"hidden_size": None}, "hidden_size is missing"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported here, only 'silu'"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear' is not supported"),
    ({"num_experts_per_tok": 9}, "--num_experts_per_token=9: must be between 1 and num_experts=4"),
  ],
)
def test_configurations_that_are_not_supported(fields, match, folder):
  change_config(folder, **fields)
  refused(folder, f"config.json: {match}")


ID = r"must be an integer from 0 to 47, below vocab_size=48, or a list of such$"


@pytest.mark.parametrize(
  ("fields", "match"),
  [
    ({"max_position_embeddings": "64"}, "max_position_embeddings='64': must be an integer from 0 to "),
    ({"max_position_embeddings": -1}, "max_position_embeddings=-1: must be"),
    ({"max_position_embeddings": True}, "max_position_embeddings=True: must be"),
    ({"vocab_size": 48.0}, "vocab_size=48.0: must be an integer from 1 to "),
    ({"eos_token_id": 2.5}, f"eos_token_id=2.5: {ID}"),
    ({"eos_token_id": "x"}, f"eos_token_id='x': {ID}"),
    ({"eos_token_id": [3, 48]}, rf"eos_token_id=\[3, 48\]: {ID}"),
    ({"eos_token_id": {"a": 1}}, rf"eos_token_id={{'a': 1}}: {ID}"),
    ({"bos_token_id": 10**6}, f"bos_token_id=1000000: {ID}"),
    ({"bos_token_id": "a"}, f"bos_token_id='a': {ID}"),
    ({"pad_token_id": -2}, f"pad_token_id=-2: {ID}"),
    ({"eos_token_id": [2, -1]}, rf"eos_token_id=\[2, -1\]: {ID}"),
    ({"quantization_config": "x"}, "quantization_config='x': must be an object such as "),
    ({"quantization_config": [1]}, r"quantization_config=\[1\]: must be an object such as "),
    (
      {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 0]}},
      r"quantization_config.weight_block_size=\[128, 0\]: must be two positive integers",
    ),
  ],
)
def test_numbers_that_are_none(fields, match, folder, monkeypatch):
  """Before a weight is read, and also where config.json is all that is read."""
  monkeypatch.setattr("moe_jax.interop.load.load_parameter", lambda *args: pytest.fail("something was read"))
  change_config(folder, **fields)
  refused(folder, f"config.json: {match}")
  with pytest.raises(InputError, match=f"config.json: {match}"):
    read_model_config(folder)


def test_an_id_of_minus_one_is_none(folder):
  """SentencePiece has it, and older files of published models."""
  change_config(folder, bos_token_id=-1, eos_token_id=-1, pad_token_id=-1)
  read = lambda: read_numbers(folder, Values("config.json", read_config(folder / "config.json")))
  found = read()
  change_config(folder, bos_token_id=None, eos_token_id=None, pad_token_id=None)
  assert found == read() and found.stop_ids == ()


@pytest.mark.parametrize("ids", [2.5, "x", 48, [2, None]])
def test_stop_ids_that_are_none(ids, folder):
  (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
  refused(folder, rf"generation_config.json: eos_token_id=.*: {ID}")


def test_files_that_are_missing_or_torn(saved, tmp_path):
  folder = tmp_path / "several"
  shutil.copytree(saved / "several", folder)
  files = sorted(folder.glob("*.safetensors"))
  content = files[1].read_bytes()
  files[1].write_bytes(content[:-1])
  with pytest.raises(InputError, match=rf"{re.escape(str(files[1]))}: is not a whole safetensors file"):
    moe_jax.load(folder)
  files[1].unlink()
  files[2].unlink()
  refused(folder, rf"2 of {len(files)} files are missing: {files[1].name}, {files[2].name}$")
  shutil.copy(files[0], files[1])
  shutil.copy(files[0], files[2])
  refused(
    folder,
    rf"{files[1].name}: .*index.json puts model.* here, which this file does not have; use files of one",
  )
  (folder / "model.safetensors.index.json").write_text('{"weight_map": []}')
  refused(folder, "index.json: is no index of a checkpoint")


def test_a_torn_tokenizer_is_named_by_its_file(folder):
  """It came with the checkpoint, not by a flag."""
  (folder / "tokenizer.json").write_text('{"a"')
  refused(folder, r"/tokenizer.json: is not a tokenizer.json \(")


def test_tensors_that_are_missing_or_left_over(folder):
  gone = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
  change_tensors(folder, lambda tensors: tensors.pop(gone))
  refused(folder, f"the checkpoint lacks 1 tensors, such as {gone}$")

  def rename(tensors):
    for layer in range(2):
      tensors[f"model.layers.{layer}.extra"] = tensors.pop(f"model.layers.{layer}.self_attn.q_proj.weight")

  change_tensors(folder, rename)
  refused(
    folder,
    r"lacks 3 tensors, such as model.*, and has no use here for 2 tensors, such as model.layers.0.extra",
  )


def test_tied_embeddings_have_no_head(folder):
  change_config(folder, tie_word_embeddings=True)
  refused(folder, "the checkpoint has no use here for 1 tensors, such as lm_head.weight")


def test_shapes_that_do_not_fit_the_configuration(folder):
  change_config(folder, num_key_value_heads=4)
  name = "model.layers.0.self_attn.k_proj.weight"
  refused(folder, rf"{name} has shape \[8, 16\], and config.json gives it \[16, 16\]")


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool"])
def test_parameters_are_no_integers(dtype, folder):
  """Not in fp8 or mxfp4 either, whose integers are scales and blocks."""
  change_tensors(folder, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].astype(dtype)}))
  refused(folder, f"model.norm.weight has type {dtype}, and parameters are floating point; of quantised")


def test_too_little_memory_is_said_before_anything_is_read(folder, monkeypatch):
  size = 4 * sum(x.size for x in open_file(folder / "model.safetensors").values())
  monkeypatch.setattr(memory, "_free_on_host", lambda: size)
  moe_jax.load(folder)
  monkeypatch.setattr(memory, "_free_on_host", lambda: size - 1)
  monkeypatch.setattr("moe_jax.interop.load.load_parameter", lambda *args: pytest.fail("something was read"))
  refused(
    folder,
    r"the model needs 0.0 GB in float32, and this host has 0.0 GB free; dtype='bfloat16' needs 0.0 GB; or a mesh that "
    r"splits it over 2 such hosts; or moe_jax.LayerStream \(examine.py --stream\) keeps one layer in memory at a time, "
    r"of which the largest has 0.0 GB",
  )


def test_devices_with_too_little_memory():
  class Device:
    platform, memory_stats = (
      "gpu",
      lambda self: {"bytes_limit": 80_000_000_000, "bytes_in_use": 10_000_000_000},
    )

    def __str__(self):
      return "cuda:0"

  right = (
    "m needs 93.4 GB in bfloat16, and cuda:0 has 70.0 GB free; a mesh that splits it over 2 such devices"
  )
  with pytest.raises(InputError, match=f"{right}$"):
    memory.check_memory("m", {Device(): 93_400_000_000}, "bfloat16")
  with pytest.raises(InputError, match=f"{right}$"):  # nor does a layer fit
    memory.check_memory("m", {Device(): 93_400_000_000}, "bfloat16", layer=70_000_000_001)
  memory.check_memory("m", {Device(): 70_000_000_000}, "bfloat16")


@pytest.mark.parametrize(
  ("free", "ways"),
  [
    (50, "dtype='bfloat16' needs 50.0 GB; or a mesh that splits it over 2 such hosts; or STREAM 22.0 GB"),
    (49, "a mesh that splits it over 3 such hosts; or STREAM 22.0 GB"),
    (21, "a mesh that splits it over 5 such hosts; or STREAM WITH 11.0 GB"),
    (10, "a mesh that splits it over 10 such hosts"),
  ],
)
def test_only_what_fits_is_named(free, ways, monkeypatch):
  """100 GB in float32, of which the largest layer has 22."""
  monkeypatch.setattr(memory, "_free_on_host", lambda: free * 10**9)
  with pytest.raises(InputError) as error:
    memory.check_memory("m", {jax.devices()[0]: 100 * 10**9}, "float32", layer=22 * 10**9)
  rest = "keeps one layer in memory at a time, of which the largest has"
  ways = ways.replace("STREAM WITH", f"STREAM with dtype='bfloat16' {rest}").replace(
    "STREAM 2", f"STREAM {rest} 2"
  )
  ways = ways.replace("STREAM", "moe_jax.LayerStream (examine.py --stream)")
  assert str(error.value) == f"m needs 100.0 GB in float32, and this host has {free}.0 GB free; {ways}"


def test_options_that_do_not_exist(model, folder, tmp_path):
  refused(folder, "load: dtype must be float32 or bfloat16, got 'int8'", dtype="int8")
  with pytest.raises(InputError, match="save: format must be one of hf, got 'gguf'"):
    moe_jax.save(model, tmp_path / "new", format="gguf")
  with pytest.raises(InputError, match=r"save: .* already holds weights; choose another folder"):
    moe_jax.save(model, folder)


@pytest.mark.parametrize(
  ("fields", "moe", "match"),
  [
    (
      {},
      {"router": "sigmoid_topk"},
      "mixtral, where router is softmax_topk, and here sigmoid_topk in layer 0$",
    ),
    ({"activation": "relu"}, {"experts": "relu"}, "where experts is swiglu, and here relu in layer 0"),
    (
      {"residual": "normed_input", "qk_norm": True},
      {},
      "minimax, where mixer attention has no key_norm.scale_D in layer 0$",
    ),
    ({"qk_norm": True}, {"num_shared_experts": 1}, "qwen3_moe, where the shared experts differ in layer 0$"),
    ({"ffn": "latent_moe"}, {}, "the feed-forward part is moe, and here latent_moe in layer 0"),
  ],
)
def test_models_of_no_published_family(fields, moe, match, tmp_path):
  config = dataclasses.replace(MIXTRAL, **fields, moe=dataclasses.replace(MIXTRAL.moe, **moe))
  with pytest.raises(InputError, match=f"save: no published family computes what this model does; .*{match}"):
    moe_jax.save(random_model(config), tmp_path / "new")
  assert not (tmp_path / "new").exists()


def test_a_bias_that_the_family_has_no_tensor_for(tmp_path):
  moe = dataclasses.replace(MIXTRAL.moe, balancers="switch_loss:0.01,loss_free_bias:0.001")
  with pytest.raises(InputError, match=r"no tensor for ffn.balancer_state \[2, 4\]"):
    moe_jax.save(random_model(dataclasses.replace(MIXTRAL, moe=moe)), tmp_path / "new")
  assert not (tmp_path / "new").exists()
