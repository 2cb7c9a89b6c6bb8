"""Ids and texts of a tokenizer.model with added tokens are those that transformers makes for Mixtral."""

import json

import numpy as np
import pytest

from moe_jax.data.chat import read_chat_template
from moe_jax.data.prompts import encode_example
from moe_jax.data.tokenizers import ModelIds, load_tokenizer
from tests.parity import oracles
from tests.parity.test_chat import CHATML, EXAMPLES, TEXT

sentencepiece = pytest.importorskip("sentencepiece")
PARTS = (
  "<|im_start|>",
  "<|im_end|>",
  "</s>",
  "<s>",
  "<unk>",
  " ",
  "  ",
  "\n",
  "the fox",
  "or no",
  "ö",
  "▁",
  "a",
)
V = 340


@pytest.fixture(scope="module", params=["nmt_nfkc", "identity"])
def folder(request, tmp_path_factory):
  """With the spaces of Llama, or with those that SentencePiece has by default."""
  folder = tmp_path_factory.mktemp("tokenizer")
  llama = request.param == "identity"
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter([line for text in TEXT for line in text.splitlines()] * 5),
    **{
      "model_prefix": str(folder / "tokenizer"),
      "model_type": "bpe",
      "vocab_size": V,
      "byte_fallback": True,
    },
    **{"normalization_rule_name": request.param, "remove_extra_whitespaces": not llama, "minloglevel": 2},
    **{"hard_vocab_limit": False},
  )
  (folder / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
  return folder


@pytest.mark.parametrize("flags", [{}, {"lstrip": True}, {"rstrip": True}, {"special": False}], ids=str)
@pytest.mark.parametrize("legacy", [None, True, False])
def test_ids_and_texts(folder, legacy, flags):
  size = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).vocab_size()
  token = {"special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
  tokens = {size: {"content": "<|im_start|>"} | token | flags, size + 1: {"content": "<|im_end|>"} | token}
  config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "<|im_end|>"}
  config |= {"unk_token": "<unk>", "added_tokens_decoder": tokens, "chat_template": CHATML}
  (folder / "tokenizer_config.json").write_text(
    json.dumps(config | ({"legacy": legacy} if legacy is not None else {}))
  )
  theirs = oracles.transformers.AutoTokenizer.from_pretrained(folder)
  ours = load_tokenizer(str(folder / "tokenizer.model"), ModelIds(512))
  rng = np.random.default_rng(0)
  for _ in range(200):
    text = "".join(rng.choice(PARTS, rng.integers(0, 8)))
    ids = theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.encode(text).tolist() == ids, text
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
  template = read_chat_template(folder)
  for example in EXAMPLES:
    both = [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.response}]
    found = encode_example(example, ours, size + 1, template).ids
    np.testing.assert_array_equal(found, theirs.apply_chat_template(both, return_dict=False))
    assert size + 1 in found
