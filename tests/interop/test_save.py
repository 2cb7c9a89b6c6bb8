"""A model is saved whole or not at all, and never among the files of another one."""

import errno
import json
import os
import shutil

import pytest

import moe_jax
from moe_jax.data.bpe import train_bpe
from moe_jax.errors import InputError
from moe_jax.interop import save
from moe_jax.training.start import save_model
from tests.interop.helpers import MIXTRAL, assert_same_model, random_model
from tests.interop.published import BEGIN, END, V, write_published

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
    ("file", "File exists"),
    ("file/below", "Not a directory"),
    ("dangling", "File exists"),
    ("closed", "Denied"),
  ],
)
def test_a_place_that_cannot_be_written_is_named(name, said, published, tmp_path, monkeypatch):
  def denied(prefix, dir):
    raise PermissionError(errno.EACCES, "Denied", f"{dir}/{prefix}x")

  (tmp_path / "file").touch()
  (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
  if name == "closed":  # as if without rights, which root always has
    monkeypatch.setattr(save.tempfile, "TemporaryDirectory", denied)
  with pytest.raises(InputError, match=rf"^{tmp_path / name}: {said}$"):
    moe_jax.save(published["a"], tmp_path / name)


def test_links_and_files_that_are_only_read(published, tmp_path):
  """A copy of them can be written, and a link to a folder is kept."""
  own = shutil.copytree(published["a"].folder, tmp_path / "own")
  for path in own.iterdir():
    path.chmod(0o444)
  (tmp_path / "out").mkdir()
  (tmp_path / "link").symlink_to(tmp_path / "out")
  moe_jax.save(moe_jax.load(own), tmp_path / "link")
  assert (tmp_path / "link").is_symlink()
  assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o644}
  assert_same_model(moe_jax.load(tmp_path / "link").model, published["a"].model)


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


def test_what_was_made_of_a_published_model_is_saved_with_its_files_and_ids(tmp_path):
  one = moe_jax.load(write_published(tmp_path / "published"))
  loaded = moe_jax.load(save_model(tmp_path / "adapted", one.model, one.config, one.tokenizer))
  moe_jax.save(loaded, tmp_path / "hf")
  for name in ("tokenizer.json", "tokenizer_config.json", TEMPLATE):
    assert (tmp_path / "hf" / name).read_bytes() == (one.folder / name).read_bytes()
  values = json.loads((tmp_path / "hf/config.json").read_text())
  assert [values[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [BEGIN, END, END]
  again = moe_jax.load(tmp_path / "hf")
  assert (again.stop_ids, again.max_positions, again.tokenizer.ids) == ((END,), 512, one.tokenizer.ids)
  assert_same_model(again.model, one.model)


def test_ids_that_the_model_does_not_embed_are_refused(tmp_path):
  """As the tokenizer of an adapted model with a full vocabulary has, if the folder does not say its ids."""
  one = moe_jax.load(write_published(tmp_path / "published"))
  folder = save_model(tmp_path / "adapted", one.model, one.config)
  loaded = moe_jax.load(folder)
  assert loaded.tokenizer.pad_id >= V
  with pytest.raises(
    InputError, match=rf"adapted has bos_token_id={V}, and the model a vocabulary of {V}; use "
  ):
    moe_jax.save(loaded, tmp_path / "hf")
  assert not (tmp_path / "hf").exists()
  moe_jax.save(loaded._replace(tokenizer=one.tokenizer), tmp_path / "hf")
  assert moe_jax.load(tmp_path / "hf").tokenizer.ids == one.tokenizer.ids
