"""Tokens beside a SentencePiece model: taken out of a text before the model sees it, and put back. tests/parity has transformers'."""

import hashlib
import json

import pytest

from moe_jax.data.tokenizers import ModelIds, load_tokenizer
from moe_jax.errors import InputError
from tests.data.helpers import write_files

sentencepiece = pytest.importorskip("sentencepiece")
TEXT = "the quick brown fox jumps over the lazy dog, again and again\n" * 20
START, END = 70, 71


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  folder = tmp_path_factory.mktemp("sp")
  text = write_files(folder, {"text.txt": TEXT}) / "text.txt"
  sentencepiece.SentencePieceTrainer.train(
    input=str(text), model_prefix=str(folder / "sp"), vocab_size=70, model_type="bpe", minloglevel=2
  )
  return (folder / "sp.model").read_bytes()


def write(folder, model, added=None, config=None):
  (folder / "tokenizer.model").write_bytes(model)
  for name, values in (("added_tokens.json", added), ("tokenizer_config.json", config)):
    if values is not None:
      (folder / name).write_text(json.dumps(values))
  return str(folder / "tokenizer.model")


def decoder(**fields):
  flags = {"special": True, "lstrip": False, "rstrip": False, "single_word": False} | fields
  tokens = {START: "<|im_start|>", END: "<|im_end|>"}
  return {"added_tokens_decoder": {str(i): {"content": text} | flags for i, text in tokens.items()}}


@pytest.mark.parametrize("where", ["added_tokens.json", "tokenizer_config.json"])
def test_added_tokens_are_one_id(model, tmp_path, where):
  files = {"added": {"<|im_start|>": START, "<|im_end|>": END}} if where[0] == "a" else {"config": decoder()}
  plain, path = load_tokenizer(write(tmp_path, model)), write(tmp_path, model, **files)
  tokenizer = load_tokenizer(path, ModelIds(72))
  fox, dog = (plain.encode(text).tolist() for text in ("the fox", "lazy dog"))
  text = "<|im_start|>the fox<|im_end|>lazy dog</s>"
  assert tokenizer.encode(text).tolist() == [START, *fox, END, *dog, 2]
  assert tokenizer.decode(tokenizer.encode(text)) == "the fox lazy dog"
  assert tokenizer.encode("the fox").tolist() == fox and len(plain.encode(text)) > len(fox) + len(dog) + 9
  assert tokenizer.fingerprint != plain.fingerprint == hashlib.sha256(model).hexdigest()
  assert tokenizer.vocab_size == 72 and load_tokenizer(path).vocab_size == 80
  with pytest.raises(InputError, match="has ids up to 71, and the model a vocabulary of 71"):
    load_tokenizer(path, ModelIds(71))


def test_a_space_before_each_text_or_before_the_first(model, tmp_path):
  ids = {}
  for legacy in (None, True, False):
    path = write(tmp_path, model, config=decoder() | ({} if legacy is None else {"legacy": legacy}))
    ids[legacy] = load_tokenizer(path, ModelIds(72)).encode("dog<|im_end|>dog").tolist()
  processor = sentencepiece.SentencePieceProcessor(model_proto=model)
  pieces = {k: [processor.id_to_piece(i) if i != END else "END" for i in v] for k, v in ids.items()}
  assert pieces[None] == pieces[True]
  assert "".join(pieces[True]) == "▁dogEND▁dog" and "".join(pieces[False]) == "▁dogENDdog"


def test_tokens_that_are_text_are_decoded_and_take_spaces(model, tmp_path):
  path = write(tmp_path, model, config=decoder(special=False, lstrip=True, rstrip=True))
  tokenizer = load_tokenizer(path, ModelIds(72))
  text = "the fox \n<|im_start|>  dog"
  assert tokenizer.encode(text).tolist() == tokenizer.encode("the fox<|im_start|>dog").tolist()
  assert tokenizer.decode(tokenizer.encode(text)) == "the fox<|im_start|> dog"


@pytest.mark.parametrize(
  ("name", "content", "match"),
  [
    ("added_tokens.json", "[" * 100_000, "is no JSON$"),
    ("added_tokens.json", "[]", "must be an object$"),
    ("added_tokens.json", '{"<a>": "x"}', "'<a>' has the id 'x', which must be an integer from 0"),
    ("added_tokens.json", '{"<a>": true}', "'<a>' has the id True, which"),
    ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "added_tokens_decoder must be an object"),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"70": {}}}', "has no text for 70$"),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"-1": {"content": "a"}}}', "'a' has the id '-1'"),
    ("tokenizer_config.json", '{"legacy": "no"}', "legacy='no': must be true or false$"),
    (
      "tokenizer_config.json",
      json.dumps(decoder(single_word=True)),
      r"is a token only as a single word, .*save_",
    ),
  ],
)
def test_damaged_files_are_one_line(model, tmp_path, name, content, match):
  path = write(tmp_path, model)
  (tmp_path / name).write_text(content)
  with pytest.raises(InputError, match=f"{name}: .*{match}") as error:
    load_tokenizer(path, ModelIds(72))
  assert "\n" not in str(error.value)
