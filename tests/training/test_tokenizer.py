"""What is made of a published model keeps its ids, its tokenizer and its chat template, however often it is trained."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest

import moe_jax
from moe_jax.data.chat import read_chat_template
from moe_jax.data.prompts import Example, prompt_dataset
from moe_jax.data.tokenizers import load_tokenizer
from moe_jax.errors import InputError
from moe_jax.training.load import load_run, tokenizer_name
from moe_jax.training.loop import Run
from moe_jax.training.start import save_model
from tests import tiny
from tests.interop.published import BEGIN, END, V, write_published

EXAMPLES = [Example(f"{n}+1=", str(n + 1)) for n in range(16)]
FILES = ("tokenizer.json", "chat_template.jinja", "tokenizer_config.json")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
  return moe_jax.load(write_published(tmp_path_factory.mktemp("models") / "published"))


@pytest.fixture(scope="module")
def start(published, tmp_path_factory):
  folder = tmp_path_factory.mktemp("models") / "start"
  return save_model(folder, published.model, published.config, published.tokenizer)


@pytest.fixture(scope="module")
def trained(published, start, tmp_path_factory):
  """The folder of a run that starts from it."""
  config = tiny.change(
    published.config, num_steps=1, batch_size=2, sequence_length=16, eval_batches=1, init_from=str(start)
  )
  config = dataclasses.replace(config, mesh=tiny.ONE_DEVICE)
  dataset = prompt_dataset(
    config.data, EXAMPLES[:12], EXAMPLES[12:], load_tokenizer(tokenizer_name(load_run(start)))
  )
  assert dataset.info.vocab_size == V
  folder = tmp_path_factory.mktemp("runs") / "run"
  Run(config, dataset, folder).train()
  return folder


def known(loaded):
  tokenizer = loaded.tokenizer
  ids = tokenizer.bos_id, tokenizer.pad_id, tokenizer.vocab_size, loaded.stop_ids, loaded.max_positions
  return (
    ids,
    tokenizer.encode("ab<end>").tolist(),
    tokenizer.fingerprint,
    read_chat_template(loaded.folder).source,
  )


def test_a_saved_model_and_a_run_from_it_have_the_ids_of_the_published_one(published, start, trained):
  assert known(published)[0] == (BEGIN, END, V, (END,), 512)
  for folder in (start, trained):
    assert known(load_run(folder)) == known(published)
    for name in FILES:
      assert (folder / name).read_bytes() == (published.folder / name).read_bytes()


def test_generation_is_the_same_after_saving(published, start):
  options = {"max_new_tokens": 4, "stop_ids": ()}
  assert moe_jax.generate(load_run(start), "ab", **options) == moe_jax.generate(published, "ab", **options)


def test_it_does_not_need_the_published_folder(published, start, tmp_path):
  folder = shutil.copytree(start, tmp_path / "start")
  path = folder / "config.json"
  values = json.loads(path.read_text())
  values["data"]["tokenizer"] = "/gone/tokenizer.json"
  path.write_text(json.dumps(values))
  assert known(load_run(folder)) == known(published)
  (folder / "tokenizer.json").unlink()
  with pytest.raises(InputError, match=r"tokenizer.json or tokenizer.model is missing; copy it .*\(/gone/"):
    load_run(folder)


def test_a_folder_of_before_loads_as_before(published, start, tmp_path):
  """It does not say the ids, and its tokenizer gets new ones."""
  folder = tmp_path / "start"
  shutil.copytree(start, folder, ignore=shutil.ignore_patterns(*FILES))
  path = folder / "config.json"
  values = json.loads(path.read_text())
  del values["model_ids"]
  path.write_text(json.dumps(values))
  loaded = load_run(folder)
  length = loaded.config.data.sequence_length
  assert (loaded.tokenizer.vocab_size, loaded.stop_ids, loaded.max_positions) == (264, (), length)
  assert tokenizer_name(loaded) == str(published.folder / "tokenizer.json")


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("vocab_size", "x"),
    ("bos_id", V),
    ("pad_id", -1),
    ("stop_ids", [V]),
    ("stop_ids", 1),
    ("max_positions", None),
  ],
)
def test_ids_that_are_none_are_one_line(start, tmp_path, name, value):
  values = json.loads((start / "config.json").read_text())
  values["model_ids"][name] = value
  (tmp_path / "config.json").write_text(json.dumps(values))
  shutil.copy(start / "tokenizer.json", tmp_path)
  with pytest.raises(
    InputError, match=r"config.json: model_ids=.*: must be what a run writes; copy it"
  ) as error:
    load_tokenizer(str(tmp_path / "tokenizer.json"))
  assert "\n" not in str(error.value)


def test_text_that_is_cut_without_the_ids_is_refused(published, start, tmp_path):
  """The embedding has a row for each id either way, but that of another bos is not trained."""
  config = tiny.change(published.config, num_steps=1, batch_size=2, sequence_length=16, init_from=str(start))
  config = dataclasses.replace(config, mesh=tiny.ONE_DEVICE)
  plain = load_tokenizer(str(published.folder / "tokenizer.json"))
  assert plain.ids is None
  dataset = prompt_dataset(config.data, EXAMPLES[:12], EXAMPLES[12:], plain)
  dataset.info = dataset.info._replace(vocab_size=V)
  match = (
    f"--init_from=.*ids of a published one.*; choose --tokenizer={re.escape(str(start))}/tokenizer.json$"
  )
  with pytest.raises(InputError, match=match):
    Run(config, dataset, tmp_path / "run").train()


def test_a_second_round_writes_examples_as_the_first(published, trained):
  """With the template, and with the end token where there is none."""
  data = dataclasses.replace(published.config.data, sequence_length=64, batch_size=2)
  rows = []
  for loaded in (published, load_run(trained)):
    for template in (read_chat_template(loaded.folder), None):
      dataset = prompt_dataset(data, EXAMPLES[:12], EXAMPLES[12:], loaded.tokenizer, template=template)
      rows.append(next(iter(dataset.validation_batches()))["tokens_BL"])
  np.testing.assert_array_equal(rows[0], rows[2])
  np.testing.assert_array_equal(rows[1], rows[3])


def test_a_model_whose_configuration_is_damaged_is_written_again_with_its_files(published, start, tmp_path):
  folder = shutil.copytree(start, tmp_path / "start")
  (folder / "config.json").write_text("{")
  save_model(folder, published.model, published.config, published.tokenizer)
  assert known(load_run(folder)) == known(published)
  assert (tmp_path / "damaged" / "start-1" / "chat_template.jinja").exists()
