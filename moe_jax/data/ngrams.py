"""Yardsticks: how well byte models that only count do on the same validation documents.

The model of order n predicts a byte from the n - 1 bytes before it in its document. A document begins with n - 1
start symbols, which are never predicted. Unlike the windows of a data set, a context reaches back over the
beginning of a window. Interpolated Witten-Bell smoothing has no parameter to tune:

  p(b | h) = (c(h, b) + t(h) p(b | h')) / (c(h) + t(h))

Here c counts in the training documents, t(h) is the number of different bytes seen after the context h, h' is h
without its first byte, and the distribution below the unigrams is uniform over the 256 bytes. A context that was
never seen leaves p(b | h'). This is method C of Witten and Bell (1991), interpolated as in Chen and Goodman (1998).
The formula is from memory; the papers were not re-read.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from moe_jax.data.cache import keep, read, texts_key

NAMES = ("unigram", "bigram", "trigram")
_START = 256  # the start symbol
_CHUNK = 1 << 22  # bytes that are counted at a time, so that memory does not grow with the text


class ByteNgrams:
  """The byte models of orders 1 to `order`, counted on documents.

  Bytes that the documents lack share one symbol without counts, so a table has the cube of about a hundred entries
  for trigrams of plain text, not of 256.
  """

  def __init__(self, documents: Sequence[bytes], order: int = len(NAMES)):
    seen = np.zeros(_START + 1, bool)
    seen[_START] = True
    for document in documents:
      seen[np.frombuffer(document, np.uint8)] = True
    self._size = size = int(seen.sum()) + 1
    self._symbol = np.where(seen, np.cumsum(seen) - 1, size - 1).astype(np.int32)
    self._counts = [np.zeros(size**n, np.int32) for n in range(1, order + 1)]
    for chunk in self._chunks(documents):
      for counts, cells in zip(self._counts, chunk, strict=True):
        counts += np.bincount(cells, minlength=len(counts)).astype(np.int32)
    by_context = [counts.reshape(-1, size) for counts in self._counts]
    self._totals = [counts.sum(1) for counts in by_context]
    self._kinds = [(counts > 0).sum(1) for counts in by_context]

  def probabilities(self, documents: Sequence[bytes]) -> np.ndarray:
    """Returns [order, bytes] the probability of every byte of the documents, by each order."""
    return np.concatenate([np.zeros((len(self._counts), 0)), *self._probabilities(documents)], axis=1)

  def bits_per_byte(self, documents: Sequence[bytes]) -> np.ndarray:
    """Returns [order] the mean of -log2 p over all bytes of the documents."""
    bits = sum(-np.log2(p).sum(1) for p in self._probabilities(documents))
    return bits / sum(map(len, documents))

  def _probabilities(self, documents: Sequence[bytes]) -> Iterator[np.ndarray]:
    for chunk in self._chunks(documents):
      p, orders = 1 / 256, []
      for cells, counts, totals, kinds in zip(chunk, self._counts, self._totals, self._kinds, strict=True):
        context = cells // self._size
        t = kinds[context]
        p = (counts[cells] + np.where(t, t, 1) * p) / (totals[context] + np.where(t, t, 1))
        orders.append(p)
      yield np.stack(orders)

  def _chunks(self, documents: Sequence[bytes]) -> Iterator[list[np.ndarray]]:
    """Yields for each order the table cells of consecutive bytes: context * size + byte."""
    order, size = len(self._counts), self._size
    start = np.full(order - 1, _START, np.uint16)
    group: list[np.ndarray] = []
    length = 0
    for i, document in enumerate(documents):
      group += [start, np.frombuffer(document, np.uint8)]
      length += len(document)
      if length < _CHUNK and i + 1 < len(documents):
        continue
      text = np.concatenate(group)
      end = len(text)
      symbols = self._symbol[text]
      predicted = text[order - 1 :] != _START
      cells = [symbols[order - 1 :]]
      for n in range(1, order):
        cells.append(symbols[order - 1 - n : end - n] * size**n + cells[-1])
      yield [c[predicted] for c in cells]
      group, length = [], 0


def yardsticks(train: Sequence[str], validation: Sequence[str], folder: Path) -> dict[str, float]:
  """Returns bits per byte of the validation documents by the name of the model, counted on `train`.

  Counting takes about a second for 6 MB. The result is kept in `folder`.
  """
  path = folder / "yardsticks" / f"v1-{texts_key(train)}-{texts_key(validation)}.json"
  content = read(path)
  if content is None:
    to_bytes = lambda texts: [text.encode(errors="replace") for text in texts]
    bits = ByteNgrams(to_bytes(train)).bits_per_byte(to_bytes(validation))
    content = json.dumps(dict(zip(NAMES, bits.tolist(), strict=True))).encode()
    keep(path, content)
  return json.loads(content)
