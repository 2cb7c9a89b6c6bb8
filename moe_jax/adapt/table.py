"""The text that adapted models are measured on, and the table of what was measured."""

import csv
import dataclasses
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from moe_jax import disk
from moe_jax.data import Batch, Dataset, load_dataset
from moe_jax.data.loading import check_same_ids, text_of_run
from moe_jax.errors import InputError, unknown_name


def text_of(loaded: Any, text_folder: str = "") -> Dataset:
  """Returns the text that a loaded model was trained on, or that of a folder, as the model reads it: with its tokenizer.

  Raises:
    InputError: if there is no such text, or a router reads its domains and does not know them.
  """
  data = loaded.config.data
  if not text_folder:
    return loaded.as_trained(text_of_run(loaded.folder, data, loaded.tokenizer))
  check_same_ids(data.dataset, "text_folder")
  data = dataclasses.replace(data, dataset="text_folder", text_folder=text_folder)
  return loaded.as_trained(load_dataset(data, loaded.tokenizer))


def calibration_batches(dataset: Dataset, number: int, domain: str = "") -> list[Batch]:
  """Returns the first batches of the training text; with a domain, those that have some of it, and only that.

  Raises:
    InputError: if there is no such domain, or it has no training text.
  """
  batches = dataset.train_batches()
  if not domain:
    return list(itertools.islice(batches, number))
  check_domain(dataset, domain)
  index = dataset.info.domains.index(domain)
  of_domain = lambda batch: batch | {"mask_BL": batch["mask_BL"] & (batch["domain_B"] == index)[:, None]}
  some = (batch for batch in map(of_domain, batches) if batch["mask_BL"].any())
  return list(itertools.islice(some, number))


def check_domain(dataset: Dataset, domain: str) -> None:
  """Raises `InputError` if the text has no such domain, or only validation text of it, of which no batch would ever come."""
  domains = dataset.info.domains
  if domain not in domains:
    raise unknown_name("domain", domain, domains)
  if not has_training_text(dataset, domain):
    others = ", ".join(name for name in domains if has_training_text(dataset, name))
    raise InputError(
      f"--domain={domain}: has no training text, as tasks that are held out; choose one of {others}"
    )


def has_training_text(dataset: Dataset, domain: str) -> bool:
  """Returns whether a domain has training text, for all that is known: splits that are cut lazily are not counted."""
  counts = dataset.info.targets_per_domain.get("train")
  return counts is None or counts[dataset.info.domains.index(domain)] > 0


def row(method: str, experts: int, scores: Mapping[str, Any]) -> dict[str, Any]:
  """Returns one line of a table: bits per byte, or nats per token where text has no bytes, of all text and each domain.

  Args:
    method, experts: what was done, and how many experts are left.
    scores: of `moe_jax.inference.evaluate`.
  """
  value = lambda score: score.nll if score.bits_per_byte is None else score.bits_per_byte
  return {"method": method, "experts": experts} | {name: value(score) for name, score in scores.items()}


def write_table(
  path: pathlib.Path, rows: Sequence[Mapping[str, Any]], shown: Sequence[str] | None = None
) -> None:
  """Writes rows with equal keys as CSV, and prints them; with `shown`, only these columns; if that is empty, nothing."""
  with disk.whole_text(path) as file:
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
  columns = {
    name: [name, *(_text(row[name]) for row in rows)] for name in (rows[0] if shown is None else shown)
  }
  widths = [max(map(len, cells)) for cells in columns.values()]
  for line in zip(*columns.values(), strict=True):
    print("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)))
  print(f"written: {path}")


def _text(value: Any) -> str:
  if value is None:
    return "-"
  if isinstance(value, float):
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.4f}"
  return f"{value:,}" if isinstance(value, int) else str(value)
