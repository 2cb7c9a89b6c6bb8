"""Prepared TFDS data sets, read by name without TensorFlow."""

import shutil
import socket

import numpy as np
import pytest

from moe_jax.data import load_dataset, tfds_text
from moe_jax.errors import InputError
from tests.data.helpers import config, same, take, window_texts

tfds = pytest.importorskip("tensorflow_datasets")
TEXTS = [f"document {i}: " + "lorem ipsum dolor " * (i % 7) for i in range(200)]


def prepare(folder, name, features, splits):
  """Writes a data set called `name` into `folder` in ArrayRecord format, as `tfds build` would."""

  class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")
    url_infos = None
    _checksums_path = None

    def _info(self):
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
      return {s: self._generate_examples(examples) for s, examples in splits.items()}

    def _generate_examples(self, examples):
      yield from enumerate(examples)

  Builder.name = name
  Builder(data_dir=folder, file_format="array_record").download_and_prepare()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  tfds.disable_progress_bar()
  folder = str(tmp_path_factory.mktemp("tfds"))
  text = {"text": tfds.features.Text()}
  label = {"label": tfds.features.ClassLabel(names=["neg", "pos"])}
  plain = [{"text": t} for t in TEXTS]
  prepare(folder, "tiny_plain", text, {"train": plain})
  labelled = [{"text": t, "label": i % 2} for i, t in enumerate(TEXTS)]
  prepare(folder, "tiny_labelled", {**text, **label}, {"train": labelled[20:], "test": labelled[:20]})
  prepare(folder, "tiny_copies", text, {"train": plain[5:], "test": plain[3:8]})
  body = {"body": tfds.features.Text(), "id": tfds.features.Scalar(np.int64)}
  prepare(
    folder,
    "tiny_body",
    body,
    {"train": [{"body": t, "id": 0} for t in TEXTS], "validation": [{"body": "v" * 99, "id": 1}]},
  )
  two = {"question": tfds.features.Text(), "answer": tfds.features.Text()}
  prepare(folder, "tiny_two", two, {"train": [{"question": "q", "answer": "a"}]})
  return folder


def open_tfds(folder, name, **flags):
  return load_dataset(config(dataset=name, data_dir=folder, **flags))


def test_labels_are_domains_and_test_is_validation(folder):
  dataset = open_tfds(folder, "tiny_labelled")
  assert dataset.info.domains == ("neg", "pos")
  sizes = [sum(len(t) for t in TEXTS[d:20:2]) for d in range(2)]
  assert dataset.info.targets_per_domain["validation"] == tuple(sizes)
  for text, domain in window_texts(next(dataset.validation_batches(200))):
    if text.startswith(b"document"):
      assert int(text.split(b":")[0].split()[1]) % 2 == domain


def test_other_text_feature_and_last_percent(folder):
  assert b"v" * 32 in [t for t, _ in window_texts(next(open_tfds(folder, "tiny_body").validation_batches()))]
  plain = open_tfds(folder, "tiny_plain")
  assert plain.info.domains == ("tiny_plain",)
  bos = sum(int((b["tokens_BL"] == 256).sum()) for b in plain.validation_batches())
  assert bos == 2  # documents, 1% of 200


def test_documents_in_both_splits_get_a_line(folder, capsys):
  open_tfds(folder, "tiny_copies")
  (line,) = capsys.readouterr().err.splitlines()
  assert line == "note: --dataset=tiny_copies: 3 of 5 documents of validation are in training, too"
  open_tfds(folder, "tiny_labelled")
  assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["tiny_labelled", "tiny_plain"])
def test_large_data_sets_are_cut_lazily_to_the_same_text(folder, name, monkeypatch):
  eager = open_tfds(folder, name)
  monkeypatch.setattr(tfds_text, "IN_MEMORY_BYTES", 0)
  lazy = open_tfds(folder, name)
  assert lazy.info.num_windows == {} and lazy.info.domains == eager.info.domains
  assert lazy.info.fingerprint != eager.info.fingerprint
  assert lazy.info == open_tfds(folder, name).info
  assert lazy.documents_per_group == (1 if name == "tiny_labelled" else 8)

  def targets(dataset):
    real = [b["targets_BL"][b["mask_BL"]] for b in dataset.validation_batches()]
    return sorted(t for t in np.concatenate(real) if t < 256)

  assert targets(lazy) == targets(eager)
  batches = take(lazy.train_batches(), 50)
  assert all(map(same, batches, take(open_tfds(folder, name).train_batches(), 50)))
  if name == "tiny_labelled":
    assert {int(d) for b in batches for d in b["domain_B"]} == {0, 1}


def test_a_tokenizer_is_trained_on_what_is_held_in_memory(folder, monkeypatch):
  assert open_tfds(folder, "tiny_plain", tokenizer="bpe:264").info.vocab_size == 264
  monkeypatch.setattr(tfds_text, "IN_MEMORY_BYTES", 0)
  with pytest.raises(
    InputError, match=r"^--tokenizer=bpe:264: needs a data set of limited size, .* up to 64 MB"
  ):
    open_tfds(folder, "tiny_plain", tokenizer="bpe:264")


def test_names_are_not_looked_up_on_the_network(folder, monkeypatch):
  def connect(*unused_arguments):
    raise AssertionError("nothing is downloaded")

  monkeypatch.setattr(socket, "create_connection", connect)
  monkeypatch.setattr(socket.socket, "connect", connect)
  for name in ("huggingface:foo", "kaggle:foo", "no_such_name", "lm1b:1.1.0", "lm1b/plain_text:9.9.9"):
    with pytest.raises(InputError):
      open_tfds(folder, name)


@pytest.mark.parametrize("in_memory", [0, 64_000_000])
def test_damaged_files_are_named(folder, tmp_path, monkeypatch, in_memory):
  """Held in memory, or read while it trains."""
  monkeypatch.setattr(tfds_text, "IN_MEMORY_BYTES", in_memory)
  shutil.copytree(f"{folder}/tiny_body", tmp_path / "tiny_body")
  (path,) = tmp_path.glob("tiny_body/*/*train.array_record*")
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)
  with pytest.raises(InputError, match=rf"^--data_dir: {path.parent} is damaged .* with tfds build") as error:
    dataset = open_tfds(str(tmp_path), "tiny_body")
    [next(dataset.train_batches()) for _ in range(50)]
  assert "\n" not in str(error.value)


def test_input_errors(folder, tmp_path):
  cases = {
    "tiny_two": "needs a text feature named text, or only one; its features are .*question",
    "lm1b": "is not prepared in .*; run: tfds build lm1b --file_format=array_record --data_dir=",
    "c4/en": "is not prepared in .*; run: tfds build c4/en",
    "wikipedia/20230601.en": "is not prepared",
    "stdlb": "unknown dataset 'stdlb': did you mean stdlib",
    "lm1c": "unknown dataset 'lm1c': did you mean lm1b",
    "no such/thing!": "unknown dataset 'no such/thing!'",
    "": "unknown dataset ''",
    "huggingface:foo": "must be .* NAME:VERSION of a TFDS data set that is prepared on disk; nothing is downloaded",
    "huggingface:foo/bar:1.0.0": "nothing is downloaded",
  }
  for name, message in cases.items():
    with pytest.raises(InputError, match=message) as error:
      open_tfds(folder, name)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
