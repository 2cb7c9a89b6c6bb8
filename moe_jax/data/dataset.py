"""`Dataset`: the interface through which training and evaluation read data from any source.

The global batch of a step does not depend on the number of processes. Process p of n produces only rows
[p*B/n, (p+1)*B/n) of it.
"""

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax import disk
from moe_jax.config import DataConfig
from moe_jax.data.bpe import BpeCache
from moe_jax.data.cache import cache_dir
from moe_jax.data.ngrams import yardsticks
from moe_jax.data.tokenizers import Tokenizer, load_tokenizer
from moe_jax.data.windows import (
  Batch,
  DocumentWindows,
  Text,
  WindowSource,
  fingerprint_texts,
  masked_rows,
  utf8_length,
)
from moe_jax.errors import InputError

VALIDATION_SEED = 0  # the validation order never depends on data_seed
_ENDLESS = 1 << 40  # steps
_TRIED = 100_000  # characters, in less than a second


class DatasetInfo(NamedTuple):
  """The properties of a data set that a result records. Split names: train, validation."""

  name: str
  vocab_size: int  # V, a multiple of 8 except for markov
  domains: tuple[str, ...]  # S names; `domain_B` indexes them
  fingerprint: str  # sha256 over documents, labels and tokenizer; for markov over its parameters
  num_windows: dict[str, int]  # per split; lazily cut splits are missing here and in the next two fields
  targets_per_domain: dict[str, tuple[int, ...]]  # per split, S counts
  padded_fraction: dict[str, float]  # per split, masked positions / all positions
  num_bytes: dict[str, int]  # per split, utf-8 bytes of the documents; empty for markov and lazily cut splits
  bytes_per_domain: dict[str, tuple[int, ...]]  # per split, S counts; as `num_bytes`
  # utf-8 bytes per target of the training split, of its beginning if it is cut lazily; None for markov. The `bos` between
  # joined documents is a target.
  bytes_per_token: float | None
  # bits per byte of the whole validation split by byte models of each order: `moe_jax.data.ngrams`; as `num_bytes`
  yardsticks: dict[str, float]
  # markov only. entropy_rate is the exact best mean loss of a model that knows the domain. validation_floor
  # is the loss of the true mixture on these validation windows: the floor for a model that must infer the domain.
  entropy_rate: float | None = None  # nats per token
  validation_floor: float | None = None  # nats per target


class Dataset:
  """A data set whose windows can be read in any order.

  Args:
    config: the data configuration.
    info: see `DatasetInfo`.
    train, validation: the windows of the two splits.
    tokenizer: its `pad_id` fills fully masked rows; None: token ids that stand for no text, padded with 0.
  """

  def __init__(
    self,
    config: DataConfig,
    info: DatasetInfo,
    train: WindowSource,
    validation: WindowSource,
    tokenizer: Tokenizer | None = None,
  ):
    self.config = config
    self.info = info
    self._train = train
    self._validation = validation
    self.tokenizer = tokenizer
    self._pad_id = tokenizer.pad_id if tokenizer else 0
    self._validation_bytes: dict[int, float] = {}  # by limit

  def train_batches(
    self, *, process_index: int = 0, process_count: int = 1, data_seed: int | None = None
  ) -> Any:
    """Returns an endless grain `DatasetIterator` over batches of batch_size / process_count sequences.

    Windows are shuffled over all documents and domains, and again in each epoch. The order depends only on
    `data_seed` (None: the config's). A batch may span two epochs. `get_state()` returns a small dict that is the
    same for every process. `set_state()` resumes exactly, even with another number of processes.
    """
    import grain

    own = own_rows(self.config.batch_size, process_index, process_count)
    seed = self.config.data_seed if data_seed is None else data_seed
    indices = shuffled_indices(len(self._train), self.config.batch_size, seed)
    # Only the indices are computed for the whole batch. A process does not read the windows of other processes.
    batches = grain.MapDataset.range(_ENDLESS).map(lambda step: self._train.rows(indices(step)[own]))
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))

  def validation_batches(
    self, batch_size: int | None = None, *, process_index: int = 0, process_count: int = 1, limit: int = 0
  ) -> Iterator[Batch]:
    """Yields the whole validation split once, in a fixed shuffled order, so that its beginning is a fair sample.

    Args:
      batch_size: sequences over all processes; None: `config.batch_size`.
      process_index, process_count: as in `train_batches`.
      limit: the maximum number of batches; 0: all.

    Every process yields the same number of batches, all of the same shape. The last batch is padded with rows
    whose `mask_BL` is all False (and whose `domain_B` is 0).
    """
    batch_size = batch_size or self.config.batch_size
    own = own_rows(batch_size, process_index, process_count)
    return self._read_validation(batch_size, own, limit)

  def validation_bytes(self, num_targets: float, limit: int = 0) -> float | None:
    """Returns the utf-8 bytes that the targets of `validation_batches(limit=limit)` stand for; None for markov.

    They are those of `bytes_of_rows`, so they are exact for a whole split in memory.

    Args:
      num_targets: the number of these targets, over all processes.
      limit: the maximum number of batches; 0: all.
    """
    if self.tokenizer is None:
      return None
    if self.tokenizer.token_bytes is None and "validation" not in self.info.bytes_per_domain:
      return (
        num_targets * self.info.bytes_per_token
      )  # without another pass over documents that are cut lazily
    if limit not in self._validation_bytes:  # the same in every evaluation
      self._validation_bytes[limit] = float(
        sum(self.bytes_of_rows(batch).sum() for batch in self.validation_batches(limit=limit))
      )
    return self._validation_bytes[limit]

  def bytes_of_rows(self, batch: Batch) -> np.ndarray:
    """Returns the utf-8 bytes that the targets of each sequence of validation stand for, [B]; 0 for markov.

    They are exact where every token is a fixed string of bytes (`bytes`, `bpe:SIZE`). Otherwise they are the targets
    times the mean bytes per target: of the documents of their domain in the validation split, or of the training
    documents at the beginning if splits are cut lazily. What a tokenizer drops counts, for it is of the text.
    """
    targets_BL, mask_BL, domain_B = batch["targets_BL"], batch["mask_BL"], batch["domain_B"]
    if self.tokenizer is None:
      return np.zeros(len(targets_BL))
    if self.tokenizer.token_bytes is not None:
      return (self.tokenizer.token_bytes[targets_BL] * mask_BL).sum(axis=1)
    mean_S = np.full(len(self.info.domains), self.info.bytes_per_token)
    if "validation" in self.info.bytes_per_domain:
      targets_S = np.maximum(self.info.targets_per_domain["validation"], 1)
      mean_S = np.asarray(self.info.bytes_per_domain["validation"]) / targets_S
    return mask_BL.sum(axis=1) * mean_S[domain_B]

  def with_domains(self, domains: Sequence[str]) -> "Dataset":
    """Returns the same text with its domains numbered as in `domains`, which may have more: as a model knows them.

    Raises:
      InputError: if a domain is not there.
    """
    own = self.info.domains
    if missing := [name for name in own if name not in domains]:
      raise InputError(
        f"--dataset={self.info.name}: domains {', '.join(missing)} are not among those that are known, "
        f"{', '.join(domains)}"
      )
    spread = lambda counts: tuple(counts[own.index(name)] if name in own else 0 for name in domains)
    counts = ("targets_per_domain", "bytes_per_domain")
    spread_all = {name: {s: spread(c) for s, c in getattr(self.info, name).items()} for name in counts}
    number_S = np.array([domains.index(name) for name in own], np.int32)
    other = copy.copy(self)
    other.info = self.info._replace(domains=tuple(domains), **spread_all)
    other._train, other._validation = (
      self._renumbered(source, number_S) for source in (self._train, self._validation)
    )
    return other

  def _renumbered(self, source: Any, number_S: np.ndarray) -> Any:
    return _Renumbered(source, number_S)

  def _read_validation(self, batch_size: int, own: slice, limit: int) -> Iterator[Batch]:
    order = np.random.default_rng(VALIDATION_SEED).permutation(len(self._validation))
    starts = range(0, len(order), batch_size)
    for start in starts[:limit] if limit else starts:
      batch = self._validation.rows(order[start : start + batch_size][own])
      yield masked_rows(batch, own.stop - own.start, self._pad_id)


class _Renumbered:
  """Windows with other numbers of their domains."""

  def __init__(self, windows: WindowSource, number_S: np.ndarray):
    self._windows, self._number_S = windows, number_S

  def __len__(self) -> int:
    return len(self._windows)

  def rows(self, indices: Sequence[int]) -> Batch:
    batch = self._windows.rows(indices)
    return batch | {"domain_B": self._number_S[batch["domain_B"]]}


def dataset_of_texts(
  config: DataConfig,
  name: str,
  splits: dict[str, list[Text]],
  domains: tuple[str, ...],
  flag: tuple[str, str],
  tokenizer: Tokenizer | None = None,
) -> Dataset:
  """Returns an in-memory data set of documents.

  A `tokenizer` stands for the one that the configuration names.

  Raises:
    InputError: naming `flag` (name, value), if a split has less than one window of text.
  """
  strings = {split: [text for text, _ in texts] for split, texts in splits.items()}
  bpe = None
  if config.bpe_size and tokenizer is None:
    bpe = BpeCache(strings["train"], config.bpe_size, cache_dir(config))
  tokenizer = bpe.tokenizer if bpe else tokenizer or load_tokenizer(config.tokenizer)
  windows = {}
  for split, texts in splits.items():
    tokens = bpe.encode(strings[split]) if bpe else map(tokenizer.encode, strings[split])
    documents = zip(tokens, (domain for _, domain in texts), strict=True)
    windows[split] = DocumentWindows(documents, tokenizer, config.sequence_length)
  for split, w in windows.items():
    if w.targets_per_window.sum() < config.sequence_length:
      right = f"too little text for one {split} window of {config.sequence_length} tokens"
      raise InputError(f"--{flag[0]}={flag[1]}: {right}")
  note_loss(tokenizer, strings["validation"])
  bytes_per_domain = {split: _bytes_per_domain(texts, len(domains)) for split, texts in splits.items()}
  num_bytes = {split: sum(counts) for split, counts in bytes_per_domain.items()}
  info = DatasetInfo(
    name=name,
    vocab_size=tokenizer.vocab_size,
    domains=domains,
    fingerprint=fingerprint_texts(splits, domains, tokenizer),
    num_windows={split: len(w) for split, w in windows.items()},
    targets_per_domain={split: w.targets_per_domain(len(domains)) for split, w in windows.items()},
    padded_fraction={split: w.padded_fraction for split, w in windows.items()},
    num_bytes=num_bytes,
    bytes_per_domain=bytes_per_domain,
    bytes_per_token=num_bytes["train"] / int(windows["train"].targets_per_window.sum()),
    yardsticks=yardsticks(strings["train"], strings["validation"], cache_dir(config)),
  )
  return Dataset(config, info, windows["train"], windows["validation"], tokenizer)


def _bytes_per_domain(texts: list[Text], num_domains: int) -> tuple[int, ...]:
  counts = [0] * num_domains
  for text, domain in texts:
    counts[domain] += utf8_length(text)
  return tuple(counts)


def note_loss(tokenizer: Tokenizer, texts: Iterable[str]) -> None:
  """Says so if tokens do not give back a text: the first texts are tried, of about `_TRIED` characters in all."""
  tried = 0
  for text in texts if tokenizer.token_bytes is None else ():
    text = text[: _TRIED - tried]
    if tokenizer.decode(tokenizer.encode(text)) != text:
      return disk.note(
        "the tokenizer does not give back the text that it encodes: what it drops or changes costs the model no bits, and "
        "bits per byte are too low beside those of other tokenizers"
      )
    tried += len(text)
    if tried >= _TRIED:
      return None


def own_rows(batch_size: int, process_index: int, process_count: int) -> slice:
  """Returns the rows of the global batch that one process produces.

  Raises:
    InputError: if the number of processes does not divide the batch size.
  """
  if batch_size % process_count:
    raise InputError(f"--batch_size={batch_size}: must be a multiple of the {process_count} processes")
  share = batch_size // process_count
  return slice(process_index * share, (process_index + 1) * share)


def shuffled_indices(num_windows: int, batch_size: int, data_seed: int) -> Callable[[int], np.ndarray]:
  """Returns a function from step to [batch_size] window indices. Each epoch is a new random order of all windows.

  This is plain numpy because grain shuffles and batches element by element, which costs more than reading the
  windows when batches are large.
  """

  @functools.lru_cache(maxsize=2)
  def order(epoch: int) -> np.ndarray:
    return np.random.default_rng((seed_bits(data_seed), epoch)).permutation(num_windows)

  def indices(step: int) -> np.ndarray:
    epoch_B, position_B = np.divmod(step * batch_size + np.arange(batch_size), num_windows)
    epochs = range(int(epoch_B[0]), int(epoch_B[-1]) + 1)
    return np.concatenate([order(epoch)[position_B[epoch_B == epoch]] for epoch in epochs])

  return indices


def seed_bits(data_seed: int) -> int:
  """Folds any integer into 32 bits, because random generators accept only 32 bits or no negative numbers."""
  return int(data_seed) % (1 << 32)
