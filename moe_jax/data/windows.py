"""Cuts documents into windows of L+1 tokens and serves batches of them.

A document is `bos` followed by its tokens. Windows of L+1 tokens start every L tokens, so each token after `bos`
is the target of exactly one position. Windows never cross documents. The last window of a document is padded, and
`mask_BL` is False where there is no target. The tail of a document is never dropped, however short it is.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from moe_jax.data.tokenizers import Tokenizer

# tokens_BL int32, targets_BL int32, mask_BL bool (True: the target is real), domain_B int32
Batch = dict[str, np.ndarray]


class WindowSource(Protocol):
  """Random access to windows. Row i does not depend on when it is read or on the other rows read with it."""

  def __len__(self) -> int: ...

  def rows(self, indices: Sequence[int]) -> Batch: ...


class Text(NamedTuple):
  """One document before tokenisation; `domain` indexes the data set's domains."""

  text: str
  domain: int


def utf8_length(text: str) -> int:
  """Returns the bytes of a text in utf-8, lone surrogates as the tokenizers replace them."""
  return len(text) if text.isascii() else len(text.encode(errors="replace"))


def text_digest(text: str) -> bytes:
  """Returns what equal documents share."""
  return hashlib.sha256(text.encode(errors="replace")).digest()


class DocumentWindows:
  """The windows of a list of tokenised documents, held in memory: 2 bytes per token (4 above 65536 ids).

  Args:
    documents: (tokens, domain) pairs, tokens without bos; documents without tokens are dropped.
    tokenizer: provides `bos_id` and `pad_id`.
    sequence_length: L.

  Raises:
    InputError: if the tokenizer has no `bos_id`.
  """

  def __init__(self, documents: Iterable[tuple[np.ndarray, int]], tokenizer: Tokenizer, sequence_length: int):
    self._length = sequence_length
    self._pad = tokenizer.pad_id
    bos_id = tokenizer.begin_id()
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    tokens, starts, counts, domains = [np.zeros(0, dtype)], [], [], []
    offset = 0
    for document, domain in documents:
      if not len(document):
        continue
      begins = np.arange(0, len(document), sequence_length)
      tokens += [np.array([bos_id], dtype), document.astype(dtype)]
      starts.append(offset + begins)
      counts.append(np.minimum(len(document) - begins, sequence_length))
      domains.append(np.full(len(begins), domain))
      offset += len(document) + 1
    self._tokens = np.concatenate(tokens)
    self._starts = np.concatenate([np.zeros(0, np.int64), *starts]).astype(np.int64)
    # real targets per window
    self.targets_per_window = np.concatenate([np.zeros(0, np.int64), *counts]).astype(np.int64)
    self.domain_per_window = np.concatenate([np.zeros(0, np.int64), *domains]).astype(np.int32)

  def __len__(self) -> int:
    return len(self._starts)

  def rows(self, indices: Sequence[int]) -> Batch:
    """Returns the windows with these indices, in this order."""
    index_B = np.asarray(indices, np.int64)
    position = np.arange(self._length + 1)
    count_B1 = self.targets_per_window[index_B, None]
    at = np.minimum(self._starts[index_B, None] + position, len(self._tokens) - 1)
    window = np.where(position <= count_B1, self._tokens[at], self._pad).astype(np.int32)
    return {
      "tokens_BL": window[:, :-1],
      "targets_BL": window[:, 1:],
      "mask_BL": position[:-1] < count_B1,
      "domain_B": self.domain_per_window[index_B],
    }

  def targets_per_domain(self, num_domains: int) -> tuple[int, ...]:
    return tuple(
      int(n)
      for n in np.bincount(self.domain_per_window, weights=self.targets_per_window, minlength=num_domains)
    )

  @property
  def padded_fraction(self) -> float:
    """Masked positions / all positions."""
    return 1.0 - float(self.targets_per_window.sum()) / max(1, len(self) * self._length)


def masked_rows(batch: Batch, num_rows: int, pad_id: int) -> Batch:
  """Appends rows without targets, with domain 0, until the batch has `num_rows`."""
  missing = num_rows - len(batch["domain_B"])
  fill = {"tokens_BL": pad_id, "targets_BL": pad_id, "mask_BL": False, "domain_B": 0}
  fill |= {"is_target_BL": False, "segment_BL": 0}
  return {
    name: np.concatenate([array, np.full((missing, *array.shape[1:]), fill[name], array.dtype)])
    for name, array in batch.items()
  }


def fingerprint_texts(splits: dict[str, Iterable[Text]], domains: Sequence[str], tokenizer: Tokenizer) -> str:
  """Returns the sha256 over the tokenizer and the splits' documents and labels, in order.

  It does not include sequence length, batch size or `data_seed`, which are in the configuration.
  """
  digest = hashlib.sha256(tokenizer.fingerprint.encode())
  for split, texts in splits.items():
    for text, domain in texts:
      data = text.encode(errors="replace")
      digest.update(f"\0{split}\0{domains[domain]}\0{len(data)}\0".encode())
      digest.update(data)
  return digest.hexdigest()
