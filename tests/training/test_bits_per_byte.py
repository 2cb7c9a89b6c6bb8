"""Bits per byte: the same for every tokenizer and every part of the validation set, absent where it has no meaning."""

import dataclasses
import math
import types

import numpy as np
import pytest
import tokenizers

from moe_jax.comparison.facts import facts_of
from moe_jax.data import load_dataset
from moe_jax.data.document_stream import StreamedDataset
from moe_jax.data.tokenizers import load_tokenizer
from moe_jax.data.windows import Text
from moe_jax.training import validate
from moe_jax.training.compiled import abstract_model
from moe_jax.training.loop import Run
from moe_jax.training.results import result_of
from moe_jax.training.step import EvalSums
from tests import tiny
from tests.data.helpers import config, write_files

ASCII = [f"item {i}: " + "the sum of many words " * (i % 5) + "x" * i for i in range(60)]
TEXTS = {"ascii": ASCII, "unicode": [t.replace("e", "é").replace("s", "日") for t in ASCII]}
LIMITS = (0, 1, 2)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
  """`load(texts, tokenizer, ...)`: these texts as files, cut into windows of 16 tokens in batches of 8."""
  root = tmp_path_factory.mktemp("texts")
  for name, texts in TEXTS.items():
    write_files(root / name, {f"{i}.txt": text for i, text in enumerate(texts)})
  model = tokenizers.Tokenizer(
    tokenizers.models.BPE()
  )  # a file, whose tokens stand for nothing that is known
  model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=300,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  model.train_from_iterator(TEXTS["ascii"], trainer)
  model.save(str(root / "tokenizer.json"))

  def build(texts, tokenizer, **changes):
    tokenizer = str(root / tokenizer) if tokenizer.endswith("json") else tokenizer
    kind = {"dataset": "text_folder", "text_folder": str(root / texts), "data_dir": str(root / "cache")}
    flags = {"tokenizer": tokenizer, "sequence_length": 16, "batch_size": 8, **kind, **changes}
    return load_dataset(config(**flags))

  return build


def run_of(dataset, folder, **fields):
  run = Run(dataclasses.replace(tiny.change(tiny.CONFIG, **fields), data=dataset.config), dataset, folder)
  model = abstract_model(run.config, dataset.info.vocab_size)
  run.steps = types.SimpleNamespace(
    model=model, evaluate=lambda state, batch: uniform_over_bytes(dataset, batch)
  )
  return run


def uniform_over_bytes(dataset, batch):
  """A model that gives each byte of each target 1/256."""
  targets = np.asarray(batch["targets_BL"])[np.asarray(batch["mask_BL"])]
  if dataset.tokenizer is None:
    return EvalSums(1.0, len(targets), len(targets), [])
  num_bytes = len(targets) if dataset.config.tokenizer == "bytes" else len(dataset.tokenizer.decode(targets))
  return EvalSums(num_bytes * math.log(256), len(targets), len(targets), [])


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_a_model_uniform_over_bytes_has_8_bits_whatever_the_tokenizer(load, tokenizer, limit, tmp_path):
  dataset = load("ascii", tokenizer)
  run = run_of(dataset, tmp_path, eval_batches=limit)
  validation = run.evaluate(None)
  assert validation["bits_per_byte"] == pytest.approx(8, rel=1e-12)
  if tokenizer == "bytes":
    assert validation["bits_per_byte"] == pytest.approx(validation["nll"] / math.log(2), rel=1e-12)
  else:
    assert validation["nll"] > 1.3 * math.log(256)
  result = result_of(run, validation, num_steps=1)
  assert result["yardsticks"] == load("ascii", "bytes").info.yardsticks  # they do not depend on the tokenizer
  batches = len(list(dataset.validation_batches()))
  for limit, known in ((batches - 1, batches - 1), (batches, 0), (batches + 9, 0)):  # no limit beyond all
    run = run_of(dataset, tmp_path, eval_batches=limit)
    said = result_of(run, run.evaluate(None), num_steps=1)
    assert (said["eval_sequences"], facts_of([said]).get("eval_batches", [])) == (
      8 * known,
      [known] if known else [],
    )
  assert sorted(result["yardsticks"]) == ["bigram", "trigram", "unigram"]
  assert result["bytes_per_token"] == dataset.info.bytes_per_token
  assert result["padded_fraction"] == dataset.info.padded_fraction["train"]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300", "tokenizer.json"])
@pytest.mark.parametrize("texts", TEXTS)
def test_bytes_are_those_of_the_documents(load, texts, tokenizer):
  dataset = load(texts, tokenizer)
  info = dataset.info
  lengths = [len(text.encode()) for text in TEXTS[texts]]
  assert sum(info.num_bytes.values()) == sum(lengths)
  targets = {split: sum(counts) for split, counts in info.targets_per_domain.items()}
  assert info.bytes_per_token == info.num_bytes["train"] / targets["train"]
  assert dataset.validation_bytes(targets["validation"]) == pytest.approx(
    info.num_bytes["validation"], rel=1e-12
  )
  batch = next(dataset.validation_batches())
  count = int(batch["mask_BL"].sum())
  part = dataset.validation_bytes(count, 1)
  if tokenizer == "tokenizer.json":  # an estimate
    assert part == pytest.approx(count * info.num_bytes["validation"] / targets["validation"])
  else:
    pieces = (
      dataset.tokenizer.decode(row[mask])
      for row, mask in zip(batch["targets_BL"], batch["mask_BL"], strict=True)
    )
    text = "".join(pieces)
    if texts == "ascii":
      assert part == len(text)
    assert 0 < part <= len(text.encode())  # characters that windows cut are replaced by three bytes each


def streamed(whole, documents):
  """The same text twice, as training and as validation, cut lazily with the tokenizer of another data set."""
  info = whole.info._replace(domains=("only",), num_bytes={}, bytes_per_domain={}, targets_per_domain={})
  return StreamedDataset(whole.config, info, documents, documents, load_tokenizer(whole.config.tokenizer))


@pytest.mark.parametrize("words", [2, 25, 1000])
@pytest.mark.parametrize("tokenizer", ["bytes", "tokenizer.json"])
def test_documents_that_are_cut_lazily_have_the_bytes_of_their_text(load, tokenizer, words):
  """Joined documents have `bos` between them, a target that stands for no byte. Long ones are not joined."""
  documents = [Text("many " * words + "x" * (i % 2), 0) for i in range(40)]
  dataset = streamed(load("ascii", tokenizer), documents)
  assert (dataset.documents_per_group > 1) == (words < 1000)
  batches = list(dataset.validation_batches())
  targets = sum(int(batch["mask_BL"].sum()) for batch in batches)
  num_bytes = sum(len(text) for text, _ in documents)
  # The last group may have fewer documents than the others: one `bos` more or less.
  near = pytest.approx(num_bytes, rel=1.01 / targets)
  assert dataset.validation_bytes(targets) == near
  assert sum(dataset.bytes_of_rows(batch).sum() for batch in batches) == near
  assert dataset.info.bytes_per_token * targets == near


def test_where_bits_per_byte_have_no_meaning(load, tmp_path, monkeypatch):
  masked = run_of(load("ascii", "bytes"), tmp_path, objective="masked_lm")
  markov = run_of(load("ascii", "bytes", dataset="markov", markov_states=16), tmp_path)
  for run in (masked, markov):
    validation = run.evaluate(None)
    assert "bits_per_byte" not in validation and validation["nll"] > 0
    assert "yardsticks" not in result_of(run, validation, num_steps=1)
    monkeypatch.setattr(validate, "_sums", lambda *args, d=run.dataset: uniform_over_bytes(d, args[-1]))
    assert validate.validate(run.steps.model, run.config, run.dataset) == validation
  both_sides = run_of(
    load("ascii", "bytes", dataset="markov", markov_states=16), tmp_path, objective="masked_lm"
  )
  for run, has_floor in ((markov, True), (both_sides, False)):
    result = result_of(run, {"nll": 1.0}, num_steps=1)
    assert [result[name] is not None for name in ("entropy_rate", "validation_floor")] == [has_floor] * 2
