"""A model is saved whole or not at all, and never among the files of another one."""

import errno
import json
import os

import pytest

import moe_jax
from moe_jax.data.bpe import train_bpe
from moe_jax.errors import InputError
from moe_jax.interop import save
from tests.interop.helpers import MIXTRAL, assert_same_model, random_model

TEMPLATE = "chat_template.jinja"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
  """Two models, each with a tokenizer of its own; the first has a chat template, too."""
  root = tmp_path_factory.mktemp("published")
  for name, text in (("a", "abc abc"), ("b", "xyz xyz")):
    moe_jax.save(random_model(MIXTRAL, vocab_size=260), root / name)
    (root / name / "tokenizer.json").write_bytes(train_bpe([text], 260))
  (root / "a" / TEMPLATE).write_text("{{ messages }}")
  return {name: moe_jax.load(root / name) for name in "ab"}


def full(*args):
  raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_save_that_failed_leaves_nothing_to_the_next(published, tmp_path, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(save, "_write", full)
    with pytest.raises(InputError, match=r"out: no space left to write .*the same command begins it anew"):
      moe_jax.save(published["a"], tmp_path / "out")
  assert not list((tmp_path / "out").iterdir())
  moe_jax.save(published["b"], tmp_path / "out")
  own = published["b"].folder
  assert (tmp_path / "out/tokenizer.json").read_bytes() == (own / "tokenizer.json").read_bytes()
  assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in own.iterdir()}
  assert_same_model(moe_jax.load(tmp_path / "out").model, published["b"].model)


@pytest.mark.parametrize(
  ("name", "said"),
  [
    ("model-00001-of-00002.safetensors", "weights"),
    ("model.safetensors.index.json", "weights"),
    ("config.json", "config.json"),
    ("checkpoints", "checkpoints"),
    ("tokenizer.json", "tokenizer.json"),
    (TEMPLATE, TEMPLATE),
  ],
)
def test_no_file_of_another_model_or_of_a_run_is_kept_or_replaced(published, name, said, tmp_path):
  (tmp_path / name).write_text(json.dumps({"train": {}}))
  with pytest.raises(InputError, match=rf"save: .* already holds {said}; choose another folder"):
    moe_jax.save(published["b"], tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == [name]


def test_other_files_in_the_folder_stay(published, tmp_path):
  (tmp_path / "README.md").write_text("of a repository")
  moe_jax.save(published["a"], tmp_path, shard_bytes=10_000)
  assert (tmp_path / "README.md").read_text() == "of a repository" and (tmp_path / TEMPLATE).exists()
  assert_same_model(moe_jax.load(tmp_path).model, published["a"].model)
