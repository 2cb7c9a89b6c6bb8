"""The files of a checkpoint: which of them are its weights, and JSON that is no index or cannot be read."""

import json
import shutil
import struct

import numpy as np
import pytest

import moe_jax
from moe_jax.errors import InputError
from tests.interop.helpers import MIXTRAL, random_model

INDEX = "model.safetensors.index.json"
DEEP = b"[" * 100_000


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  folder = tmp_path_factory.mktemp("saved")
  moe_jax.save(random_model(MIXTRAL), folder)
  return folder


@pytest.mark.parametrize(
  ("name", "content", "match"),
  [
    ("config.json", DEEP, "is not JSON"),
    ("generation_config.json", DEEP, "is not JSON"),
    (INDEX, DEEP, "is no index of a checkpoint"),
    ("model.safetensors", struct.pack("<Q", len(DEEP)) + DEEP, "is not a whole safetensors file"),
  ],
)
def test_deeply_nested_files_are_refused_in_one_line(name, content, match, saved, tmp_path):
  shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
  (tmp_path / name).write_bytes(content)
  with pytest.raises(InputError, match=rf"^{tmp_path / name}: {match} .*nested too deeply") as error:
    moe_jax.load(tmp_path)
  assert "\n" not in str(error.value) and len(str(error.value)) < len(str(tmp_path)) + 120


def test_what_is_nested_a_little_is_read(saved, tmp_path):
  shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
  values = json.loads((tmp_path / "config.json").read_text())
  (tmp_path / "config.json").write_text(json.dumps(values | {"unused": json.loads("[" * 100 + "]" * 100)}))
  moe_jax.load(tmp_path)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
  """Another model of the same shapes, in several files."""
  folder = tmp_path_factory.mktemp("other")
  moe_jax.save(random_model(MIXTRAL, seed=1), folder, shard_bytes=10_000)
  return folder


def refused(folder, match):
  with pytest.raises(InputError, match=match) as error:
    moe_jax.load(folder)
  assert "\n" not in str(error.value) and len(str(error.value)) < 2 * len(str(folder)) + 400


def test_two_sets_of_weights_are_refused(saved, other, tmp_path):
  """transformers would take the single file, whatever the index says."""
  for folder in (saved, other):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
  match = (
    rf"^{tmp_path}: holds two sets of weights, model.safetensors and that of {INDEX}; move one of them away$"
  )
  refused(tmp_path, match)
  files = json.loads((tmp_path / INDEX).read_text())["weight_map"]
  (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(files, "model.safetensors")}))
  moe_jax.load(tmp_path)  # the index names the single file alone
  (tmp_path / INDEX).write_text('{"weight_map": {}}')
  refused(tmp_path, match)


@pytest.mark.parametrize(
  "content", ["[1]", "{}", '{"weight_map": null}', '{"weight_map": ["a"]}', "3", "\udcff"]
)
def test_an_index_that_is_none(content, other, tmp_path):
  shutil.copytree(other, tmp_path, dirs_exist_ok=True)
  (tmp_path / INDEX).write_bytes(content.encode(errors="surrogateescape"))
  refused(tmp_path, rf"^{tmp_path / INDEX}: is no index of a checkpoint \(")


@pytest.mark.parametrize(
  "file", [3, None, ["x"], {}, True, "", ".", "..", "../x.safetensors", "a/../../x", "/etc/passwd"]
)
def test_an_index_names_files_of_its_folder(file, other, tmp_path):
  shutil.copytree(other, tmp_path, dirs_exist_ok=True)
  (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
  refused(tmp_path, r"is no index of a checkpoint \(it puts a into .*, which is no file of this folder\)$")


@pytest.mark.parametrize("file", ["a" * 500, "a\0b", "a\nb", "\ud800", "sub/x.safetensors"])
def test_names_that_no_file_has(file, other, tmp_path):
  shutil.copytree(other, tmp_path, dirs_exist_ok=True)
  (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
  refused(tmp_path, "1 of 1 files are missing: ")


def test_files_below_the_folder_and_links(other, tmp_path):
  """The cache of huggingface_hub has a folder of links for each version."""
  folder = tmp_path / "snapshot"
  (folder / "parts").mkdir(parents=True)
  for path in other.iterdir():
    is_part = path.suffix == ".safetensors"
    (folder / ("parts" if is_part else ".") / path.name).symlink_to(path)
  names = json.loads((other / INDEX).read_text())["weight_map"]
  (folder / INDEX).unlink()
  (folder / INDEX).write_text(
    json.dumps({"weight_map": {name: f"parts/{file}" for name, file in names.items()}})
  )
  equal = lambda a, b: np.testing.assert_array_equal(a.model.embedding_VD, b.model.embedding_VD)
  equal(moe_jax.load(folder), moe_jax.load(other))


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_a_file_that_cannot_be_read_is_not_said_to_be_damaged(name, other, tmp_path):
  """Here it is a folder; rights do not hold for root."""
  shutil.copytree(other, tmp_path, dirs_exist_ok=True)
  (tmp_path / name).unlink()
  (tmp_path / name).mkdir()
  refused(tmp_path, rf"^{tmp_path / name}: cannot be read \(Is a directory\)$")
