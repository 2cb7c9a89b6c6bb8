"""Cuts windows on the fly from data sets that are too large to tokenise up front.

Row b of the global batch of B rows reads its own documents: b, b+B, b+2B, ... of a shuffled order of all
documents. A batch therefore mixes B different documents, a process tokenises only its own rows, and the
position is two numbers per row, however large the data set is.

Windows of short documents would be mostly padding (an lm1b sentence fills half a window of 256 bytes). If there
is only one domain and the first documents are shorter than `SHORT_WINDOWS` windows on average, consecutive
documents of the shuffled order are therefore joined, with `bos` between them. Documents are never joined if there
are several domains, because a window must have a single domain.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from moe_jax.config import DataConfig
from moe_jax.data.dataset import VALIDATION_SEED, Dataset, DatasetInfo, note_loss, own_rows, seed_bits
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.data.windows import Batch, DocumentWindows, Text, masked_rows, utf8_length
from moe_jax.errors import InputError

SHORT_WINDOWS = 16  # joined documents have about this many windows: about 3% padding
_SAMPLE = 200  # documents that are read to estimate the typical length


class StreamedDataset(Dataset):
  """A `Dataset` over documents instead of windows; see the module docstring."""

  def __init__(
    self,
    config: DataConfig,
    info: DatasetInfo,
    train: Sequence[Text],
    validation: Sequence[Text],
    tokenizer: Tokenizer,
  ):
    super().__init__(config, info, train, validation, tokenizer)
    self._tokenizer, self._bos_id = tokenizer, tokenizer.begin_id()
    first = [train[i].text for i in range(min(len(train), _SAMPLE))]
    sample = [len(tokenizer.encode(text)) for text in first]
    if not sum(sample):
      raise InputError(f"--dataset={config.dataset}: its first {_SAMPLE} documents hold no text")
    note_loss(tokenizer, first)
    length = SHORT_WINDOWS * config.sequence_length
    mean = sum(sample) / len(sample)
    join = len(info.domains) == 1 and mean < length
    self.documents_per_group = math.ceil(length / mean) if join else 1
    # The `bos` between joined documents are targets, too.
    targets = sum(sample) + sum(map(bool, sample)) * (1 - 1 / self.documents_per_group)
    self.info = info._replace(bytes_per_token=sum(map(utf8_length, first)) / targets)

  def train_batches(
    self, *, process_index: int = 0, process_count: int = 1, data_seed: int | None = None
  ) -> grain.DatasetIterator:
    """Like `Dataset.train_batches`, but the state covers only this process's rows.

    Resuming needs the same number of processes.
    """
    own = own_rows(self.config.batch_size, process_index, process_count)
    groups = self._groups(
      self._train, seed_bits(self.config.data_seed if data_seed is None else data_seed)
    ).repeat()
    stream = _RowStreams(groups, range(own.start, own.stop), self.config.batch_size)
    return iter(grain.experimental.ThreadPrefetchIterDataset(stream, prefetch_buffer_size=2))

  def _renumbered(self, source: Sequence[Text], number_S: np.ndarray) -> Sequence[Text]:
    return _RenumberedTexts(source, number_S)

  def _groups(self, documents: Sequence[Text], seed: int) -> grain.MapDataset:
    """Returns the windows (`DocumentWindows`) of each group of documents, in shuffled order."""
    shuffled = grain.MapDataset.source(documents).seed(seed).shuffle()
    return shuffled.batch(self.documents_per_group, batch_fn=list).map(self._cut)

  def _cut(self, documents: list[Text]) -> DocumentWindows:
    tokens = [np.zeros(0, np.int32)]
    for text, _ in documents:
      encoded = self._tokenizer.encode(text)
      if len(encoded):
        tokens += [np.array([self._bos_id], np.int32), encoded]
    joined = np.concatenate(tokens)[1:]  # DocumentWindows adds the first bos
    return DocumentWindows([(joined, documents[0].domain)], self._tokenizer, self.config.sequence_length)

  def _read_validation(self, batch_size: int, own: slice, limit: int) -> Iterator[Batch]:
    """Every process cuts every document, because the number of windows is known only at the end."""
    pending: list[Batch] = []
    num_pending = num_batches = 0
    for windows in self._groups(self._validation, VALIDATION_SEED):
      pending.append(windows.rows(range(len(windows))))
      num_pending += len(windows)
      if num_pending < batch_size:
        continue
      rows = _concatenate(pending)
      for start in range(0, num_pending - batch_size + 1, batch_size):
        yield _slice(_slice(rows, slice(start, start + batch_size)), own)
        num_batches += 1
        if num_batches == limit:
          return
      rest = num_pending % batch_size
      pending, num_pending = [_slice(rows, slice(len(rows["domain_B"]) - rest, None))], rest
    if num_pending:
      yield masked_rows(_slice(_concatenate(pending), own), own.stop - own.start, self._pad_id)


class _RenumberedTexts(Sequence[Text]):
  """Documents with other numbers of their domains."""

  def __init__(self, documents: Sequence[Text], number_S: np.ndarray):
    self._documents, self._number_S = documents, number_S

  def __len__(self) -> int:
    return len(self._documents)

  def __getitem__(self, index: int) -> Text:
    text = self._documents[index]
    return text._replace(domain=int(self._number_S[text.domain]))


class _RowStreams(grain.IterDataset):
  """Batches of the given rows of the global batch; row b reads groups b, b + stride, b + 2*stride, ..."""

  def __init__(self, groups: grain.MapDataset, rows: range, stride: int):
    super().__init__()
    self.groups, self.rows, self.stride = groups, rows, stride

  def __iter__(self) -> grain.DatasetIterator:
    return _RowStreamsIterator(self)


class _RowStreamsIterator(grain.DatasetIterator):
  """The state is each row's current group and the number of its windows that have been read."""

  def __init__(self, streams: _RowStreams):
    super().__init__()
    self._streams = streams
    self.set_state({"group": list(streams.rows), "used": [0] * len(streams.rows)})

  def __next__(self) -> Batch:
    return _concatenate([self._next_window(row) for row in range(len(self._group))])

  def _next_window(self, row: int) -> Batch:
    if self._windows[row] is None:
      self._windows[row] = self._streams.groups[self._group[row]]
    while self._used[row] >= len(self._windows[row]):  # also skips documents without text
      self._group[row] += self._streams.stride
      self._used[row] = 0
      self._windows[row] = self._streams.groups[self._group[row]]
    self._used[row] += 1
    return self._windows[row].rows([self._used[row] - 1])

  def get_state(self) -> dict[str, Any]:
    return {"group": list(self._group), "used": list(self._used)}

  def set_state(self, state: dict[str, Any]) -> None:
    self._group = [int(g) for g in state["group"]]
    self._used = [int(u) for u in state["used"]]
    self._windows: list[DocumentWindows | None] = [None] * len(self._group)  # cut when they are needed


def _concatenate(batches: list[Batch]) -> Batch:
  return {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}


def _slice(batch: Batch, rows: slice) -> Batch:
  return {name: array[rows] for name, array in batch.items()}
