"""The law of windows: each token after bos is the target of exactly one position."""

import numpy as np
import pytest

from moe_jax.data.tokenizers import load_tokenizer
from moe_jax.data.windows import DocumentWindows, Text, fingerprint_texts, masked_rows

TEXTS = ["a", "exactly8", "exactly sixteen!", "nine char", "ünïcödé and more of it, over several windows", ""]
TOKENIZER = load_tokenizer("bytes")


def cut(length: int, texts=TEXTS) -> DocumentWindows:
  return DocumentWindows([(TOKENIZER.encode(t), i % 3) for i, t in enumerate(texts)], TOKENIZER, length)


@pytest.mark.parametrize("length", [1, 3, 8, 100])
def test_every_token_is_a_target_once_and_the_text_comes_back(length):
  windows = cut(length)
  batch = windows.rows(range(len(windows)))
  assert (
    batch["tokens_BL"].shape == batch["targets_BL"].shape == batch["mask_BL"].shape == (len(windows), length)
  )
  assert {k: v.dtype for k, v in batch.items()} == {
    "tokens_BL": np.int32,
    "targets_BL": np.int32,
    "mask_BL": bool,
    "domain_B": np.int32,
  }
  documents, domains = [], []
  for tokens, targets, mask, domain in zip(*(batch[k] for k in batch), strict=True):
    real = int(mask.sum())
    assert real and mask[:real].all()  # no empty window, padding only at the end
    if tokens[0] == TOKENIZER.bos_id:
      documents.append([])
      domains.append(domain)
    else:  # the context of a later window is the last target of the one before
      assert tokens[0] == documents[-1][-1]
    assert domain == domains[-1]
    np.testing.assert_array_equal(tokens[1:real], targets[: real - 1])
    assert (targets[real:] == TOKENIZER.pad_id).all()
    documents[-1] += targets[mask].tolist()
  assert [TOKENIZER.decode(np.array(d)) for d in documents] == [t for t in TEXTS if t]
  assert domains == [i % 3 for i, t in enumerate(TEXTS) if t]


def test_counts():
  windows = cut(8)
  lengths = [len(t.encode()) for t in TEXTS if t]
  assert len(windows) == sum(-(-n // 8) for n in lengths)
  per_domain = [sum(len(t.encode()) for t in TEXTS[d::3]) for d in range(3)]
  assert windows.targets_per_domain(4) == (*per_domain, 0)
  assert windows.padded_fraction == pytest.approx(1 - sum(lengths) / (len(windows) * 8))
  assert len(cut(8, [""])) == 0


def test_rows_do_not_depend_on_what_they_are_read_with():
  windows = cut(8)
  together = windows.rows([5, 0, 3])
  for row, index in enumerate([5, 0, 3]):
    alone = windows.rows([index])
    assert all(np.array_equal(alone[k][0], together[k][row]) for k in alone)
  assert windows.rows([])["tokens_BL"].shape == (0, 8)


def test_masked_rows():
  windows = cut(8)
  filled = masked_rows(windows.rows([1]), 3, TOKENIZER.pad_id)
  assert filled["mask_BL"].any(axis=1).tolist() == [True, False, False]
  assert (filled["tokens_BL"][1:] == TOKENIZER.pad_id).all() and not filled["domain_B"][1:].any()
  assert {k: v.dtype for k, v in filled.items()} == {k: v.dtype for k, v in windows.rows([1]).items()}


def test_fingerprint_changes_with_text_label_order_split_and_tokenizer():
  def of(train, validation, tokenizer=TOKENIZER):
    return fingerprint_texts({"train": train, "validation": validation}, ("x", "y"), tokenizer)

  a, b = Text("a", 0), Text("b", 1)
  variants = [
    of([a, b], []),
    of([b, a], []),
    of([a], [b]),
    of([a, Text("b", 0)], []),
    of([a, Text("c", 1)], []),
    of([Text("ab", 0)], []),
    of([a, b], [], TOKENIZER._replace(fingerprint="other")),
  ]
  assert len(set(variants)) == len(variants)
  assert of([a, b], []) == variants[0]
