"""Small corpora, and slow and obvious reimplementations of the pipelines."""

import dataclasses
from pathlib import Path

import numpy as np

from moe_jax.config import DataConfig
from moe_jax.data import Batch, Dataset, load_dataset


def config(**changes) -> DataConfig:
  return dataclasses.replace(DataConfig(sequence_length=32, batch_size=4), **changes)


def write_files(folder: Path, files: dict[str, str]) -> Path:
  for name, text in files.items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
  return folder


def write_library(root: Path) -> Path:
  """A folder shaped like a standard library, with every domain and some files that must be left out."""
  files = {"__future__.py": "x = 1\n", "site-packages/other.py": "SITE\n", "config-3/Setup.txt": "BUILD\n"}
  for i in range(20):
    files[f"module{i}.py"] = (
      f'"""Prose {i}."""\n# a comment\ndef f{i}():\n  """More prose {i}."""\n  return {i}\n'
    )
    files[f"test/test_{i}.py"] = f"def test_{i}():\n  assert {i} == {i}\n"
    files[f"test/decimaltestdata/n{i}.decTest"] = f"-- comment\nadd{i} add {i} 1 -> {i + 1}\n"
    files[f"encodings/cp{i}.py"] = f'"""Codec."""\nimport codecs\ndecoding_table = (\n  {i},\n)\n'
  files["pydoc_data/topics.py"] = "topics = {'b': 'Topic two.\\n', 'a': 'Topic one.\\n'}\n"
  return write_files(root, files)


def folder_dataset(folder: Path, **changes) -> Dataset:
  return load_dataset(config(dataset="text_folder", text_folder=str(folder), **changes))


def take(iterator, count: int) -> list[Batch]:
  return [next(iterator) for _ in range(count)]


def same(a: Batch, b: Batch) -> bool:
  return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a)


def join_rows(batches: list[Batch]) -> Batch:
  return {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}


def window_texts(batch: Batch) -> list[tuple[bytes, int]]:
  """(the real targets as bytes, domain) of each row of a bytes-tokenised batch that has any."""
  rows = zip(batch["targets_BL"], batch["mask_BL"], batch["domain_B"], strict=True)
  return [(t[m].astype(np.uint8).tobytes(), int(d)) for t, m, d in rows if m.any()]
