"""The counting byte models against a slow loop, what their probabilities sum to, and where they are kept."""

import math
from collections import Counter

import numpy as np
import pytest

from moe_jax.data import ngrams
from moe_jax.data.ngrams import ByteNgrams, yardsticks

TRAIN = [b"abracadabra, abracadabra", "naïve café".encode(), b"", b"a"]
UNSEEN = [b"abra zebra \xff\x00", b"", "cadé".encode(), b"a"]


def slow(train: list[bytes], history: tuple, byte: int) -> float:
  """Interpolated Witten-Bell, read off the formula; `history` has start symbols (None) where a document begins."""
  if len(history) == 0:
    lower = 1 / 256
  else:
    lower = slow(train, history[1:], byte)
  n = len(history)
  after = Counter()
  for document in train:
    padded = (None,) * n + tuple(document)
    for t in range(n, len(padded)):
      if padded[t - n : t] == history:
        after[padded[t]] += 1
  if not after:
    return lower
  return (after[byte] + len(after) * lower) / (after.total() + len(after))


@pytest.mark.parametrize("chunk", [1, 1 << 22])
def test_the_slow_loop_agrees(chunk, monkeypatch):
  monkeypatch.setattr(ngrams, "_CHUNK", chunk)
  model = ByteNgrams(TRAIN)
  expected = np.array(
    [
      [slow(TRAIN, ((None,) * n + tuple(d))[t : t + n], d[t]) for d in UNSEEN for t in range(len(d))]
      for n in range(3)
    ]
  )
  np.testing.assert_allclose(model.probabilities(UNSEEN), expected, rtol=1e-12)
  np.testing.assert_allclose(model.bits_per_byte(UNSEEN), -np.log2(expected).mean(1), rtol=1e-12)


@pytest.mark.parametrize("train", [TRAIN, [bytes(range(256)) * 2], []], ids=["text", "all bytes", "nothing"])
def test_probabilities_sum_to_1(train):
  model, rng = ByteNgrams(train), np.random.default_rng(0)
  for context in (b"", b"a", b"br", b"\xff\xfe", bytes(rng.integers(0, 256, 3, np.uint8))):
    last = np.stack([model.probabilities([context + bytes([b])])[:, -1] for b in range(256)])
    np.testing.assert_allclose(last.sum(0), 1, rtol=1e-12)
  if not train:
    np.testing.assert_array_equal(model.bits_per_byte([b"anything"]), 8)


def test_long_texts_reach_their_entropy():
  rng = np.random.default_rng(0)
  p = np.array([0.5, 0.25, 0.125, 0.125])
  draw = lambda n: bytes(rng.choice(list(b"abcd"), n, p=p).tolist())
  entropy = -(p * np.log2(p)).sum()
  model = ByteNgrams([draw(200_000)])
  np.testing.assert_allclose(model.bits_per_byte([draw(200_000)]), entropy, rtol=0.01)
  cycle = ByteNgrams([b"aab" * 20_000]).bits_per_byte([b"aab" * 20_000])
  # after an a, a and b are as likely; after two bytes, the next is known
  np.testing.assert_allclose(cycle, [math.log2(3) - 2 / 3, 2 / 3, 0], atol=0.001)


def test_they_are_kept_by_text_and_counted_again_where_nothing_can_be_kept(tmp_path, monkeypatch):
  (tmp_path / "file").touch()
  texts = [["abcabc" * 9, "x\ud800"], ["abc"]]
  first = yardsticks(*texts, tmp_path)
  assert list(first) == ["unigram", "bigram", "trigram"] and first == yardsticks(*texts, tmp_path / "file")
  other = yardsticks(texts[0], ["bca"], tmp_path)
  monkeypatch.setattr(ngrams, "ByteNgrams", None)
  assert yardsticks(*texts, tmp_path) == first != other
  kept = list(tmp_path.rglob("*.json"))
  assert len(kept) == 2
  monkeypatch.undo()
  for path in kept:
    path.write_text(path.read_text().replace("1", "2"))  # still JSON, and wrong
  assert yardsticks(*texts, tmp_path) == first
