"""Files of a checkpoint that are JSON, and are nested too deeply to be read."""

import json
import shutil
import struct

import pytest

import moe_jax
from moe_jax.errors import InputError
from tests.interop.helpers import MIXTRAL, random_model

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
    ("model.safetensors.index.json", DEEP, "is no index of a checkpoint"),
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
