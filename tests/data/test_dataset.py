"""The order, resumption and division of batches among processes, for every kind of source."""

from collections import Counter

import numpy as np
import pytest

from moe_jax.config import DataConfig
from moe_jax.data import load_dataset
from moe_jax.errors import InputError
from tests.data.helpers import config, folder_dataset, join_rows, same, take, window_texts, write_files

KINDS = ["text_folder", "markov", "streamed"]


@pytest.fixture(scope="module")
def make(tmp_path_factory):
  """`make(kind, **flags)`: the same small corpus as files, and as a data set that is cut lazily."""
  rng = np.random.default_rng(0)
  texts = ["".join(rng.choice(list("abcdefgh \n"), rng.integers(1, 200))) + str(i) for i in range(40)]
  folder = write_files(
    tmp_path_factory.mktemp("texts"), {f"{'ab'[i % 2]}/{i}.txt": text for i, text in enumerate(texts)}
  )

  def build(kind, **flags):
    if kind == "text_folder":
      return folder_dataset(folder, **flags)
    if kind == "markov":
      return load_dataset(config(dataset="markov", markov_states=8, **flags))
    from moe_jax.data.document_stream import StreamedDataset
    from moe_jax.data.tokenizers import load_tokenizer
    from moe_jax.data.windows import Text

    documents = [Text(t, 0) for t in texts]
    info = load_dataset(config(dataset="markov")).info._replace(domains=("only",), targets_per_domain={})
    return StreamedDataset(config(**flags), info, documents[:30], documents[30:], load_tokenizer("bytes"))

  return build


@pytest.mark.parametrize("kind", KINDS)
def test_domains_are_numbered_as_in_a_longer_list(make, kind):
  """Nothing else changes, of both splits."""
  dataset = make(kind)
  own = dataset.info.domains
  known = ("zero", *reversed(own), "last")
  other = dataset.with_domains(known)
  assert other.info.domains == known and dataset.info.domains == own
  for read in (lambda d: list(d.validation_batches()), lambda d: take(d.train_batches(), 4)):
    for a, b in zip(read(dataset), read(other), strict=True):
      real = a["mask_BL"].any(axis=1)
      assert [own[i] for i in a["domain_B"][real]] == [known[i] for i in b["domain_B"][real]]
      assert same(*(batch | {"domain_B": a["domain_B"]} for batch in (a, b)))
      np.testing.assert_allclose(dataset.bytes_of_rows(a), other.bytes_of_rows(b), rtol=1e-12)
  for split, counts in dataset.info.targets_per_domain.items():
    found = dict(zip(known, other.info.targets_per_domain[split], strict=True))
    assert found == dict(zip(own, counts, strict=True)) | {"zero": 0, "last": 0}
  rest = ", ".join(("new", *own[1:]))
  with pytest.raises(InputError, match=rf"domains {own[0]} are not among those that are known, {rest}$"):
    dataset.with_domains(("new", *own[1:]))


@pytest.mark.parametrize("seed", [1.5, "1", None, True], ids=repr)
def test_a_seed_of_the_data_is_an_integer_of_any_size(seed):
  for right in (-(2**70), 2**70):
    DataConfig(data_seed=right).check()
  with pytest.raises(InputError, match=f"^--data_seed={seed!r}: must be an integer$"):
    DataConfig(data_seed=seed).check()


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_orders_what_is_trained_on_and_not_the_validation(make, kind):
  first, again, other = (take(make(kind, data_seed=s).train_batches(), 5) for s in (1, 1, 2**40))
  assert all(map(same, first, again))
  assert not any(map(same, first, other))
  one, two = (list(make(kind, data_seed=s).validation_batches()) for s in (1, 2**40))
  assert all(map(same, one, two)) and len(one) == len(two)
  assert {k: v.shape for k, v in first[0].items()} == {
    "tokens_BL": (4, 32),
    "targets_BL": (4, 32),
    "mask_BL": (4, 32),
    "domain_B": (4,),
  }


@pytest.mark.parametrize("kind", KINDS)
def test_resumes_exactly_from_state(make, kind):
  dataset = make(kind)
  iterator = dataset.train_batches()
  for steps in (0, 7, 60):  # 60: into a later epoch of the two finite ones
    take(iterator, steps)
    state = iterator.get_state()
    expected = take(iterator, 3)
    fresh = make(kind).train_batches()
    next(fresh)
    fresh.set_state(state)
    assert all(map(same, take(fresh, 3), expected))


@pytest.mark.parametrize("kind", KINDS)
def test_processes_share_the_global_batch(make, kind):
  dataset = make(kind, batch_size=8)
  whole = take(dataset.train_batches(), 40)
  for count in (2, 8):
    parts = [take(dataset.train_batches(process_index=p, process_count=count), 40) for p in range(count)]
    for step in range(40):
      assert same(join_rows([part[step] for part in parts]), whole[step])


@pytest.mark.parametrize("kind", KINDS)
def test_processes_share_validation(make, kind):
  dataset = make(kind, batch_size=8)
  whole = list(dataset.validation_batches())
  parts = [list(dataset.validation_batches(process_index=p, process_count=4)) for p in range(4)]
  assert {len(part) for part in parts} == {len(whole)}
  assert all(same(join_rows([part[i] for part in parts]), batch) for i, batch in enumerate(whole))
  limited = list(dataset.validation_batches(limit=2))
  assert len(limited) == 2 and all(map(same, limited, whole))


@pytest.mark.parametrize("kind", KINDS)
def test_validation_is_whole_whatever_the_batch_size(make, kind):
  dataset = make(kind)
  everything = None
  for size in (1, 5, 16):
    batches = list(dataset.validation_batches(size))
    assert {b["tokens_BL"].shape for b in batches} == {(size, 32)}
    assert all(b["mask_BL"].any(axis=1).all() for b in batches[:-1])  # only the last is filled up
    windows = window_texts(join_rows(batches))
    everything = everything or windows
    assert windows == everything
  if kind != "streamed":
    assert len(everything) == dataset.info.num_windows["validation"]


def test_an_epoch_reads_every_window_once_and_epochs_differ(make):
  dataset = make("text_folder", batch_size=1)
  n = dataset.info.num_windows["train"]
  iterator = dataset.train_batches()
  first, second = (join_rows(take(iterator, n)) for _ in range(2))
  assert sorted(window_texts(first)) == sorted(window_texts(second))
  assert window_texts(first) != window_texts(second)
  masked = 1 - first["mask_BL"].mean()
  assert masked == pytest.approx(dataset.info.padded_fraction["train"])
  counts = np.bincount(np.repeat(first["domain_B"], first["mask_BL"].sum(1)), minlength=2)
  assert tuple(counts) == dataset.info.targets_per_domain["train"]


def test_a_batch_larger_than_the_data_set_is_filled_by_the_next_epoch(tmp_path):
  folder = write_files(tmp_path, {"a.txt": "x" * 40 + "\n" + "y" * 40, "b.txt": "z" * 40})
  dataset = folder_dataset(folder, batch_size=64)
  windows = window_texts(next(dataset.train_batches()))
  n = dataset.info.num_windows["train"]
  counts = Counter(windows)
  assert len(windows) == 64 and len(counts) == n > 1
  assert set(counts.values()) <= {64 // n, 64 // n + 1}  # every epoch has all of them
  assert len({tuple(windows[i : i + n]) for i in range(0, 64 - n, n)}) > 1  # and an order of its own


def documents_of(batches):
  """The documents of consecutive windows of a bytes-tokenised data set, in order; `bos` is in front of each."""
  text = ""
  for batch in batches:
    for tokens, targets, mask in zip(
      *(batch[k] for k in ("tokens_BL", "targets_BL", "mask_BL")), strict=True
    ):
      text += "".join("|" if t == 256 else chr(t) for t in [*tokens[:1][tokens[:1] == 256], *targets[mask]])
  return [document for document in text.split("|") if document]


def test_every_streamed_epoch_reads_every_document_once_in_an_order_of_its_own(make):
  dataset = make("streamed", batch_size=1)
  assert dataset.documents_per_group > 1  # these documents are short
  train, validation = ([t.text for t in of] for of in (dataset._train, dataset._validation))
  batches = take(dataset.train_batches(), 4 * sum(map(len, train)) // 32)  # more than three epochs
  read = documents_of(batches)
  epochs = [read[i * len(train) : (i + 1) * len(train)] for i in range(3)]
  assert [sorted(epoch) for epoch in epochs] == [sorted(train)] * 3
  assert len(set(map(tuple, [train, *epochs]))) == 4
  assert sorted(documents_of(dataset.validation_batches())) == sorted(validation)
  assert join_rows(batches)["mask_BL"].mean() > 0.9


def test_batch_size_must_divide_over_processes(make):
  for call in (make("markov").train_batches, make("markov").validation_batches):
    with pytest.raises(InputError, match=r"^--batch_size=4: must be a multiple of the 3 processes$"):
      call(process_count=3)
