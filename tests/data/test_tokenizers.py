"""Bytes, SentencePiece and Hugging Face tokenizers produce the same kind of windows."""

import sys

import numpy as np
import pytest
import tokenizers

from moe_jax.data import load_dataset, load_tokenizer
from moe_jax.data.model_ids import ModelIds
from moe_jax.data.prompts import Example, prompt_dataset
from moe_jax.data.text_folder import read_text_folder
from moe_jax.data.tokenizers import bytes_file
from moe_jax.errors import InputError
from tests.data.helpers import config, window_texts, write_files

TEXT = "the quick brown fox jumps over the lazy dog, again and again\n" * 20


def test_bytes():
  tokenizer = load_tokenizer("bytes")
  tokens = tokenizer.encode("aé€\n")
  assert tokens.tolist() == list("aé€\n".encode()) and tokens.dtype == np.int32
  assert tokenizer.decode(np.array([tokenizer.bos_id, *tokens, tokenizer.pad_id])) == "aé€\n"
  assert (tokenizer.bos_id, tokenizer.pad_id, tokenizer.vocab_size) == (256, 257, 264)


def test_the_file_of_bytes_has_every_byte():
  model = tokenizers.Tokenizer.from_buffer(bytes_file())
  assert set(model.get_vocab()) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  for text in ("".join(map(chr, range(0x800))), "\U0001f600 \u4e2d"):
    assert model.encode(text).ids == list(text.encode())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """Trained tokenizer files: a SentencePiece model without pad and one Hugging Face file without specials."""
  folder = tmp_path_factory.mktemp("tokenizers")
  made = {}
  try:
    import sentencepiece

    text = write_files(folder, {"text.txt": TEXT}) / "text.txt"
    sentencepiece.SentencePieceTrainer.train(
      input=str(text), model_prefix=str(folder / "sp"), vocab_size=70, model_type="bpe", minloglevel=2
    )
    made["sentencepiece"] = folder / "sp.model"
  except ImportError:
    pass
  model = tokenizers.Tokenizer(tokenizers.models.BPE())
  model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = tokenizers.decoders.ByteLevel()
  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
  model.train_from_iterator([TEXT], trainer)
  model.enable_truncation(5)  # must be undone: text is never cut short
  model.save(str(folder / "tokenizer.json"))
  made["tokenizers"] = folder / "tokenizer.json"
  return made


@pytest.mark.parametrize("kind", ["sentencepiece", "tokenizers"])
def test_tokenizer_files(files, kind, tmp_path):
  if kind not in files:
    pytest.skip(f"{kind} is not installed")
  tokenizer = load_tokenizer(str(files[kind]))
  tokens = tokenizer.encode(TEXT)
  assert 5 < len(tokens) < len(TEXT) / 2 and tokens.max() < tokenizer.vocab_size
  assert tokenizer.decode(tokens).split() == TEXT.split()
  assert tokenizer.vocab_size % 8 == 0
  assert max(tokenizer.bos_id, tokenizer.pad_id) < tokenizer.vocab_size
  assert tokenizer.bos_id not in tokens and tokenizer.pad_id not in tokens
  texts = [TEXT + "again\n" * i for i in range(4)]
  folder = write_files(tmp_path, {f"{i}.txt": text for i, text in enumerate(texts)})
  flags = config(dataset="text_folder", text_folder=str(folder), tokenizer=str(files[kind]))
  dataset = load_dataset(flags)
  assert dataset.info.vocab_size == tokenizer.vocab_size
  (validation,) = read_text_folder(str(folder))[0]["validation"]
  tokens = {text: tokenizer.encode(text) for text in texts}
  targets = {split: sum(counts) for split, counts in dataset.info.targets_per_domain.items()}
  assert targets["validation"] == len(tokens[validation.text])
  assert sum(targets.values()) == sum(map(len, tokens.values()))
  batch = next(dataset.validation_batches(64))
  real = batch["targets_BL"][batch["mask_BL"]]
  assert sorted(real) == sorted(tokens[validation.text])
  bytes_dataset = load_dataset(config(dataset="text_folder", text_folder=str(folder)))
  assert dataset.info.fingerprint != bytes_dataset.info.fingerprint
  assert len(window_texts(next(bytes_dataset.train_batches()))) == 4


@pytest.mark.parametrize("kind", ["sentencepiece", "tokenizers", "bytes"])
def test_lone_surrogates_are_question_marks(files, kind):
  """They come from a command line that is not utf-8, and from JSON."""
  if kind not in {*files, "bytes"}:
    pytest.skip(f"{kind} is not installed")
  encode = load_tokenizer(str(files.get(kind, kind))).encode
  np.testing.assert_array_equal(encode("caf\udce9 the \ud83d fox"), encode("caf? the ? fox"))


@pytest.mark.parametrize("name", ["missing.model", "missing.json"])
def test_missing_file(name):
  with pytest.raises(InputError, match=f"^--tokenizer={name}: no such file$"):
    load_tokenizer(name)


def test_wrong_files(tmp_path):
  write_files(tmp_path, {"a.model": "nonsense", "b.json": "{}", "c.txt": ""})
  for name, message in [
    ("a.model", "SentencePiece"),
    ("b.json", "tokenizer.json"),
    ("c.txt", "must be bytes"),
  ]:
    with pytest.raises(InputError, match=message) as error:
      load_tokenizer(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_missing_package(tmp_path, monkeypatch):
  write_files(tmp_path, {"a.model": ""})
  monkeypatch.setitem(sys.modules, "sentencepiece", None)
  with pytest.raises(InputError, match="pip install sentencepiece"):
    load_tokenizer(str(tmp_path / "a.model"))


@pytest.mark.parametrize("kind", ["sentencepiece", "tokenizers"])
def test_the_bos_of_a_published_model_is_what_the_files_beside_its_tokenizer_say(files, kind, tmp_path):
  if kind not in files:
    pytest.skip(f"{kind} is not installed")
  path = tmp_path / ("tokenizer.model" if kind == "sentencepiece" else "tokenizer.json")
  path.write_bytes(files[kind].read_bytes())
  own = load_tokenizer(str(path), ModelIds(400))
  assert own.bos_id == (1 if kind == "sentencepiece" else None)  # such a model always has one
  (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "e"}')
  named = load_tokenizer(str(path), ModelIds(400)).bos_id
  assert load_tokenizer(str(path)).decode(np.array([named])).strip() == "e"
  assert load_tokenizer(str(path), ModelIds(400, bos_id=5)).bos_id == 5
  (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<no such token>"}')
  assert load_tokenizer(str(path), ModelIds(400)).bos_id == own.bos_id
  (tmp_path / "tokenizer_config.json").write_text("{")
  with pytest.raises(InputError, match=r"tokenizer_config.json: is no JSON"):
    load_tokenizer(str(path), ModelIds(400))


def test_the_usual_names_of_what_begins_a_document(tmp_path):
  """Those of gpt-oss for its own models. What was trained here with `<|endoftext|>` keeps that."""
  path = tmp_path / "tokenizer.json"
  model = tokenizers.Tokenizer.from_buffer(bytes_file())
  model.add_special_tokens(["<|endoftext|>", "<|startoftext|>"])
  model.save(str(path))
  assert load_tokenizer(str(path), ModelIds(400)).bos_id == 257
  assert load_tokenizer(str(path)).bos_id == 256


def test_text_that_needs_a_bos_is_refused_where_no_file_says_one(files, tmp_path):
  """Token 0 is an ordinary one."""
  tokenizer = load_tokenizer(str(files["tokenizers"]), ModelIds(400))
  folder = write_files(tmp_path, {f"{i}.txt": TEXT for i in range(4)})
  flags = config(dataset="text_folder", text_folder=str(folder))
  match = "no file says which token begins a document; name it as bos_token in .*/tokenizer_config.json$"
  for make in (
    lambda: load_dataset(flags, tokenizer),
    lambda: prompt_dataset(flags, [Example("a", "b")], [Example("c", "d")], tokenizer),
  ):
    with pytest.raises(InputError, match=match) as error:
      make()
    assert "\n" not in str(error.value)
