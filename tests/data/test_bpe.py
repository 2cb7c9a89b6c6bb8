"""A BPE tokenizer trained on the corpus: the same file from the same text, every text back, kept and read again."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moe_jax.data import bpe, load_dataset
from moe_jax.data.bpe import BpeCache, load_bpe, train_bpe
from moe_jax.errors import InputError
from tests.data.helpers import config, folder_dataset, same, write_files

TEXTS = [f"def f{i}(x):\n    return x + {i}  # the sum of x and {i}\n" * (1 + i % 3) for i in range(200)]
UNSEEN = ["", "ünïcödé 日本語 🙂\u200d\r\n\t", "<|bos|><s></s>[CLS]<pad>\x00", "   x  \n\n", " " * 40 + "a\n"]


@pytest.fixture(scope="module")
def content():
  return train_bpe(TEXTS, 400)


def naive_merges(texts: list[str], count: int) -> list[tuple[bytes, bytes]]:
  """Sennrich et al., algorithm 1, on the bytes of each piece, ties to the smaller pair of ids (in order of making)."""
  pieces = [p for t in texts for p in re.findall(r" ?[a-z]+| ?[0-9]+| ?[^\sa-z0-9]+|\s+(?!\S)|\s+", t)]
  words = [[bytes([b]) for b in piece.encode()] for piece in pieces]
  # GPT-2 writes bytes as characters: printable ones as themselves, which come first in the library's ids
  rank = {bytes([b]): (not 33 <= b <= 126, b) for b in range(128)}
  merges = []
  for step in range(count):
    counts = {}
    for word in words:
      for pair in itertools.pairwise(word):
        counts[pair] = counts.get(pair, 0) + 1
    a, b = min(counts, key=lambda pair: (-counts[pair], rank[pair[0]], rank[pair[1]]))
    merges.append((a, b))
    rank.setdefault(a + b, (2, step))
    for word in words:
      i = 0
      while i < len(word) - 1:
        if (word[i], word[i + 1]) == (a, b):
          word[i : i + 2] = [a + b]
        i += 1
  return merges


def test_merges_are_those_of_the_definition():
  texts = TEXTS[:20]
  tokenizer = load_bpe(train_bpe(texts, 258 + 40))
  learned = [tokenizer.decode(np.array([256 + i])).encode() for i in range(40)]
  assert learned == [a + b for a, b in naive_merges(texts, 40)]


@pytest.mark.parametrize("text", [*UNSEEN, TEXTS[5]])
def test_every_text_comes_back(content, text):
  tokenizer = load_bpe(content)
  tokens = tokenizer.encode(text)
  assert tokens.dtype == np.int32 and not set(tokens) & {tokenizer.bos_id, tokenizer.pad_id}
  assert tokenizer.decode(np.array([tokenizer.bos_id, *tokens, tokenizer.pad_id])) == text
  assert (tokenizer.bos_id, tokenizer.pad_id, tokenizer.vocab_size) == (398, 399, 400)


def test_random_text_comes_back(content):
  tokenizer, rng = load_bpe(content), np.random.default_rng(0)
  points = np.concatenate([rng.integers(0, top, 500) for top in (128, 0xD800, 0x10FFFF)])
  text = "".join(chr(p) for p in rng.permutation(points) if not 0xD800 <= p < 0xE000)
  assert tokenizer.decode(tokenizer.encode(text)) == text
  assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"  # a lone surrogate is no text


def test_the_file_depends_on_text_and_size_only(content):
  code = (
    "import sys; from tests.data.test_bpe import TEXTS, train_bpe;"
    "sys.stdout.buffer.write(train_bpe(TEXTS[::-1], 400))"
  )
  for name, value in (("TOKENIZERS_PARALLELISM", "false"), ("RAYON_NUM_THREADS", "7")):
    command = ["env", f"{name}={value}", sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, check=True, cwd=Path(__file__).parents[2])
    assert run.stdout == content
  assert train_bpe(TEXTS, 401) != content != train_bpe(TEXTS[:20], 400)


def test_without_more_to_merge_the_vocabulary_is_smaller():
  assert load_bpe(train_bpe(["ab ab"], 10_000)).vocab_size == 264  # 256 bytes, "ab", " ab", bos, pad: 260


def test_the_cache_is_read_and_a_folder_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
  (tmp_path / "file").touch()
  cannot = BpeCache(TEXTS, 300, tmp_path / "file")
  first = BpeCache(TEXTS, 300, tmp_path)
  expected = cannot.encode(TEXTS)
  assert all(map(np.array_equal, first.encode(TEXTS), expected))
  monkeypatch.setattr(bpe, "train_bpe", None)
  again = BpeCache(TEXTS, 300, tmp_path)
  assert again.tokenizer.content == first.tokenizer.content == cannot.tokenizer.content
  again.tokenizer = again.tokenizer._replace(encode=None)
  assert all(map(np.array_equal, again.encode(TEXTS), expected)) and len(again.encode(TEXTS)) == 200
  names = sorted(p.name.split("-")[0] for p in (tmp_path / "bpe").rglob("*") if p.is_file())
  assert names == ["tokenizer.json", "tokenizer.json.sha256", "tokens", "tokens"]


def test_a_damaged_cache_is_made_again(tmp_path, capsys):
  """One byte of each file is another: of the tokenizer, a letter that leaves it valid JSON."""
  first = BpeCache(TEXTS, 300, tmp_path)
  expected = first.encode(TEXTS)
  for path in first.folder.glob("t*[!6]"):
    data = path.read_bytes()
    changed = data.replace(b"a", b"b", 1) if path.suffix == ".json" else data[:-9] + b"?" + data[-8:]
    assert changed != data
    path.write_bytes(changed)
  again = BpeCache(TEXTS, 300, tmp_path)
  assert again.tokenizer.content == first.tokenizer.content
  assert all(map(np.array_equal, again.encode(TEXTS), expected))
  said = capsys.readouterr().err.splitlines()
  assert len([line for line in said if line.startswith("note: ") and "is damaged, moved to" in line]) == 2
  assert len(list((first.folder / "damaged").iterdir())) == 2


def test_a_data_set_trains_on_its_training_split(tmp_path):
  folder = write_files(tmp_path / "texts", {f"{'ab'[i % 2]}/{i}.txt": t for i, t in enumerate(TEXTS)})
  flags = {"data_dir": str(tmp_path), "tokenizer": "bpe:320"}
  dataset, again = folder_dataset(folder, **flags), folder_dataset(folder, **flags)
  assert dataset.info == again.info and dataset.info.vocab_size == 320
  assert all(map(same, dataset.validation_batches(), again.validation_batches()))
  others = [folder_dataset(folder, **{**flags, "tokenizer": name}) for name in ("bytes", "bpe:328")]
  assert len({d.info.fingerprint for d in (dataset, *others)}) == 3
  assert others[0].tokenizer.content is None
  tokenizer = dataset.tokenizer
  text = ""
  for batch in dataset.validation_batches(1):
    text += tokenizer.decode(batch["targets_BL"][batch["mask_BL"]])
  bytes_text = b"".join(
    batch["targets_BL"][batch["mask_BL"]].astype(np.uint8).tobytes()
    for batch in others[0].validation_batches(1)
  )
  assert sorted(text.encode()) == sorted(bytes_text)


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (
      {"tokenizer": "bpe:257"},
      r"^--tokenizer=bpe:257: needs a size of at least 258: 256 bytes, bos and pad$",
    ),
    ({"tokenizer": "bpe:x"}, "at least 258"),
    ({"tokenizer": "bpe:"}, "at least 258"),
    ({"tokenizer": "bpe"}, "must be bytes, bpe:SIZE, a SentencePiece"),
  ],
)
def test_input_errors(flags, message):
  with pytest.raises(InputError, match=message) as error:
    load_dataset(config(**flags))
  assert "\n" not in str(error.value)
