"""Prompts with responses: rows, what the loss is on, and what is said of broken files."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import DataConfig
from moe_jax.data.model_ids import ModelIds
from moe_jax.data.prompts import Example, prompt_dataset, read_jsonl, write_jsonl
from moe_jax.data.tokenizers import load_tokenizer
from moe_jax.errors import InputError
from moe_jax.nn.context import Context
from moe_jax.training.objectives import Response

TOKENIZER = load_tokenizer("bytes")
CONFIG = DataConfig(sequence_length=12, batch_size=2)
TRAIN = [Example("ab:", "cd", "one"), Example("", "xyz", "two"), Example("é", "q", "one")]
HELD_OUT = [Example("zz", "y", "two")]


def test_a_row_is_bos_prompt_response_end_and_only_the_last_two_are_targets():
  dataset = prompt_dataset(CONFIG, TRAIN, HELD_OUT, TOKENIZER)
  (batch,) = dataset.validation_batches()
  bos, pad = TOKENIZER.bos_id, TOKENIZER.pad_id
  np.testing.assert_array_equal(batch["tokens_BL"][0, :4], [bos, *b"zzy"])
  np.testing.assert_array_equal(batch["targets_BL"][0, :4], [*b"zzy", bos])
  assert (batch["tokens_BL"][0, 4:] == pad).all() and (batch["targets_BL"][0, 4:] == pad).all()
  np.testing.assert_array_equal(batch["mask_BL"][0], [True] * 4 + [False] * 8)
  np.testing.assert_array_equal(batch["is_target_BL"][0], [False, False, True, True] + [False] * 8)
  assert not batch["is_target_BL"][1].any() and not batch["mask_BL"][1].any()  # fills the batch
  assert dataset.info.domains == ("one", "two") and batch["domain_B"][0] == 1
  # "cd" + end, "q" + end; "xyz" + end
  assert dataset.info.targets_per_domain == {"train": (5, 4), "validation": (0, 2)}


def test_the_loss_is_the_sum_over_responses():
  dataset = prompt_dataset(CONFIG, TRAIN, HELD_OUT, TOKENIZER)
  batch = next(iter(dataset.train_batches()))
  logits = np.random.default_rng(0).normal(size=(2, 12, TOKENIZER.vocab_size)).astype(np.float32)
  terms = Response()(lambda tokens, context: (jnp.asarray(logits), ()), batch, Context())
  expected, count = 0.0, 0
  for b in range(2):
    for t in range(12):
      if batch["is_target_BL"][b, t]:
        row = logits[b, t].astype(np.float64)
        expected -= row[batch["targets_BL"][b, t]] - np.log(np.exp(row).sum())
        count += 1
  np.testing.assert_allclose(terms.loss, expected, rtol=1e-5)
  assert Response().num_targets(batch) == count
  without = {name: x for name, x in batch.items() if name != "is_target_BL"}
  for use in (
    lambda: Response()(lambda tokens, context: (jnp.asarray(logits), ()), without, Context()),
    lambda: Response().num_targets(without),  # what a step calls first
  ):
    with pytest.raises(InputError, match="objective response: the data has no responses"):
      use()


@pytest.mark.parametrize(
  ("line", "match"),
  [
    ("{", r"data.jsonl:2: is no JSON"),
    pytest.param("[" * 200_000, r"data.jsonl:2: is no JSON", id="deep"),
    ("[1]", r"data.jsonl:2: must be an object with prompt and response, got \[1\]"),
    (json.dumps({"prompt": "a"}), r"data.jsonl:2: response is missing or no text"),
    (json.dumps({"prompt": 1, "response": "b"}), r"data.jsonl:2: prompt is missing or no text"),
    (json.dumps({"prompt": "a", "response": ""}), r"data.jsonl:2: response is empty"),
  ],
)
def test_a_broken_line_is_named(tmp_path, line, match):
  path = tmp_path / "data.jsonl"
  path.write_text(json.dumps({"prompt": "a", "response": "b", "task": "t"}) + "\n" + line + "\n")
  with pytest.raises(InputError, match=match) as error:
    read_jsonl(path)
  assert "\n" not in str(error.value)


def test_files_are_read_and_what_is_wrong_with_them_is_said(tmp_path):
  path = tmp_path / "data.jsonl"
  path.write_text(json.dumps({"prompt": "a\u2028b", "response": "b"}, ensure_ascii=False) + "\n\n")
  assert read_jsonl(path) == [Example("a\u2028b", "b")]
  path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as editors on Windows begin a file
  assert read_jsonl(path) == [Example("a\u2028b", "b")]
  written = tmp_path / "written" / "data.jsonl"
  write_jsonl(written, [*TRAIN, *HELD_OUT])
  assert read_jsonl(written) == [*TRAIN, *HELD_OUT]
  path.write_text("\n")
  with pytest.raises(InputError, match="has no examples"):
    read_jsonl(path)
  with pytest.raises(InputError, match="cannot be read as text"):
    read_jsonl(tmp_path / "none.jsonl")


def test_long_examples_and_held_out_prompts_that_are_trained_on_are_refused():
  with pytest.raises(InputError, match=r"--sequence_length=12: example 1 has 14 tokens .* at least 14"):
    prompt_dataset(CONFIG, [Example("a" * 10, "bcd")], HELD_OUT, TOKENIZER)
  with pytest.raises(InputError, match="1 prompts are in the training examples, too, such as 'ab:'"):
    prompt_dataset(CONFIG, TRAIN, [Example("ab:", "other")], TOKENIZER)


def test_the_fingerprint_follows_the_examples_and_the_split():
  a = prompt_dataset(CONFIG, TRAIN, HELD_OUT, TOKENIZER).info.fingerprint
  assert a == prompt_dataset(CONFIG, list(TRAIN), HELD_OUT, TOKENIZER).info.fingerprint
  assert a != prompt_dataset(CONFIG, TRAIN[:2], HELD_OUT, TOKENIZER).info.fingerprint
  assert a != prompt_dataset(CONFIG, HELD_OUT, TRAIN, TOKENIZER).info.fingerprint
  assert a != prompt_dataset(CONFIG, TRAIN, HELD_OUT, TOKENIZER, end_id=3).info.fingerprint
  assert a == prompt_dataset(CONFIG, TRAIN, HELD_OUT, TOKENIZER, end_id=TOKENIZER.bos_id).info.fingerprint


def test_responses_end_as_texts_of_the_published_model_do():
  published = TOKENIZER._replace(ids=ModelIds(TOKENIZER.vocab_size, stop_ids=(3, 5)))
  found = prompt_dataset(CONFIG, TRAIN, HELD_OUT, published)
  assert (
    found.info.fingerprint == prompt_dataset(CONFIG, TRAIN, HELD_OUT, TOKENIZER, end_id=3).info.fingerprint
  )
  batch = next(found.validation_batches())
  assert 3 in batch["targets_BL"] and TOKENIZER.bos_id not in batch["targets_BL"][batch["mask_BL"]]
