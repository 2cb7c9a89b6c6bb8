"""`Dataset`: what training and evaluation read, whatever the source.

The global batch of a step does not depend on the number of processes: process p of n makes rows
[p*B/n, (p+1)*B/n) of it, and only those.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from moe_jax.config import DataConfig
from moe_jax.data.tokenizers import load_tokenizer
from moe_jax.data.windows import Batch, DocumentWindows, Text, WindowSource, fingerprint_texts, masked_rows
from moe_jax.errors import InputError

VALIDATION_SEED = 0  # the validation order never depends on data_seed
_ENDLESS = 1 << 40  # steps


class DatasetInfo(NamedTuple):
  """What a result needs to say about its data. Split names: train, validation."""

  name: str
  vocab_size: int  # V, a multiple of 8 except for markov
  domains: tuple[str, ...]  # S names; `domain_B` indexes them
  fingerprint: str  # sha256 over documents, labels and tokenizer; for markov over its parameters
  num_windows: dict[str, int]  # per split; a split that is cut lazily is not in it, nor in the next two
  targets_per_domain: dict[str, tuple[int, ...]]  # per split, S counts
  padded_fraction: dict[str, float]  # per split, masked positions / all positions
  # markov only. The best mean loss of a model that knows the domain, exact; and the loss on these very
  # validation windows of the true mixture, which is the floor of a model that is not told the domain
  entropy_rate: float | None = None  # nats per token
  validation_floor: float | None = None  # nats per target


class Dataset:
  """A data set whose windows can be read in any order.

  Args:
    config: the flags.
    info: see `DatasetInfo`.
    train, validation: the windows of the two splits.
    pad_id: token id of fully masked rows.
  """

  def __init__(
    self, config: DataConfig, info: DatasetInfo, train: WindowSource, validation: WindowSource, pad_id: int
  ):
    self.config = config
    self.info = info
    self._train = train
    self._validation = validation
    self._pad_id = pad_id

  def train_batches(
    self, *, process_index: int = 0, process_count: int = 1, data_seed: int | None = None
  ) -> Any:
    """Endless grain `DatasetIterator` over batches of batch_size / process_count sequences.

    Windows are shuffled over all documents and domains, anew in each epoch, by `data_seed` alone
    (None: the config's). A batch may span two epochs. `get_state()` is a small dict, the same for every process, and
    `set_state()` resumes exactly, also with another number of processes.
    """
    import grain

    own = own_rows(self.config.batch_size, process_index, process_count)
    seed = self.config.data_seed if data_seed is None else data_seed
    indices = shuffled_indices(len(self._train), self.config.batch_size, seed)
    # only indices are made for the whole batch: a process reads no window of another
    batches = grain.MapDataset.range(_ENDLESS).map(lambda step: self._train.rows(indices(step)[own]))
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))

  def validation_batches(
    self, batch_size: int | None = None, *, process_index: int = 0, process_count: int = 1, limit: int = 0
  ) -> Iterator[Batch]:
    """The whole validation split once, in a fixed shuffled order: its beginning is a fair sample of it.

    Args:
      batch_size: sequences over all processes; None: `config.batch_size`.
      process_index, process_count: as in `train_batches`.
      limit: at most this many batches; 0: all.

    Every process makes the same number of batches, all of one shape: the last is filled up with rows
    whose `mask_BL` is False throughout (and `domain_B` 0).
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
  """An in-memory data set of documents; `flag` (name, value) is blamed if they hold less than one window."""
  tokenizer = load_tokenizer(config.tokenizer)
  windows = {}
  for split, texts in splits.items():
    tokens = ((tokenizer.encode(text), domain) for text, domain in texts)
    windows[split] = DocumentWindows(tokens, tokenizer, config.sequence_length)
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
  return Dataset(config, info, windows["train"], windows["validation"], tokenizer.pad_id)


def own_rows(batch_size: int, process_index: int, process_count: int) -> slice:
  """The rows of the global batch that one process makes. Raises `InputError` if they do not divide."""
  if batch_size % process_count:
    raise InputError(f"--batch_size={batch_size}: must be a multiple of the {process_count} processes")
  share = batch_size // process_count
  return slice(process_index * share, (process_index + 1) * share)


def shuffled_indices(num_windows: int, batch_size: int, data_seed: int) -> Callable[[int], np.ndarray]:
  """step -> [batch_size] window indices: one random order of all windows after the other.

  It is plain numpy, because grain's shuffle and batch work element by element, which for large batches
  costs more than reading the windows.
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
  """Generators take 32 bits or no negative numbers; any other integer is folded into 32 bits."""
  return int(data_seed) % (1 << 32)
