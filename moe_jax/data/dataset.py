"""`Dataset`: the interface through which training and evaluation read data from any source.

The global batch of a step does not depend on the number of processes. Process p of n produces only rows
[p*B/n, (p+1)*B/n) of it.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from moe_jax.config import DataConfig
from moe_jax.data.bpe import BpeCache
from moe_jax.data.cache import cache_dir
from moe_jax.data.tokenizers import load_tokenizer
from moe_jax.data.windows import Batch, DocumentWindows, Text, WindowSource, fingerprint_texts, masked_rows
from moe_jax.errors import InputError

VALIDATION_SEED = 0  # the validation order never depends on data_seed
_ENDLESS = 1 << 40  # steps


class DatasetInfo(NamedTuple):
  """The properties of a data set that a result records. Split names: train, validation."""

  name: str
  vocab_size: int  # V, a multiple of 8 except for markov
  domains: tuple[str, ...]  # S names; `domain_B` indexes them
  fingerprint: str  # sha256 over documents, labels and tokenizer; for markov over its parameters
  num_windows: dict[str, int]  # per split; lazily cut splits are missing here and in the next two fields
  targets_per_domain: dict[str, tuple[int, ...]]  # per split, S counts
  padded_fraction: dict[str, float]  # per split, masked positions / all positions
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
    pad_id: the token id that fills fully masked rows.
    trained_tokenizer: the tokenizer.json of a tokenizer that was trained on this data set.
  """

  def __init__(
    self,
    config: DataConfig,
    info: DatasetInfo,
    train: WindowSource,
    validation: WindowSource,
    pad_id: int,
    trained_tokenizer: bytes | None = None,
  ):
    self.config = config
    self.info = info
    self._train = train
    self._validation = validation
    self._pad_id = pad_id
    self.trained_tokenizer = trained_tokenizer

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

  def _read_validation(self, batch_size: int, own: slice, limit: int) -> Iterator[Batch]:
    order = np.random.default_rng(VALIDATION_SEED).permutation(len(self._validation))
    starts = range(0, len(order), batch_size)
    for start in starts[:limit] if limit else starts:
      batch = self._validation.rows(order[start : start + batch_size][own])
      yield masked_rows(batch, own.stop - own.start, self._pad_id)


def dataset_of_texts(
  config: DataConfig,
  name: str,
  splits: dict[str, list[Text]],
  domains: tuple[str, ...],
  flag: tuple[str, str],
) -> Dataset:
  """Returns an in-memory data set of documents.

  Raises:
    InputError: naming `flag` (name, value), if a split has less than one window of text.
  """
  bpe = None
  if config.bpe_size:
    bpe = BpeCache([text for text, _ in splits["train"]], config.bpe_size, cache_dir(config))
  tokenizer = bpe.tokenizer if bpe else load_tokenizer(config.tokenizer)
  windows = {}
  for split, texts in splits.items():
    strings = [text for text, _ in texts]
    tokens = bpe.encode(strings) if bpe else map(tokenizer.encode, strings)
    documents = zip(tokens, (domain for _, domain in texts), strict=True)
    windows[split] = DocumentWindows(documents, tokenizer, config.sequence_length)
  for split, w in windows.items():
    if w.targets_per_window.sum() < config.sequence_length:
      right = f"too little text for one {split} window of {config.sequence_length} tokens"
      raise InputError(f"--{flag[0]}={flag[1]}: {right}")
  info = DatasetInfo(
    name=name,
    vocab_size=tokenizer.vocab_size,
    domains=domains,
    fingerprint=fingerprint_texts(splits, domains, tokenizer),
    num_windows={split: len(w) for split, w in windows.items()},
    targets_per_domain={split: w.targets_per_domain(len(domains)) for split, w in windows.items()},
    padded_fraction={split: w.padded_fraction for split, w in windows.items()},
  )
  trained = bpe.content if bpe else None
  return Dataset(config, info, windows["train"], windows["validation"], tokenizer.pad_id, trained)


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
