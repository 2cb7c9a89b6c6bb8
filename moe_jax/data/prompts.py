"""Prompts with responses, from JSONL files. The loss of objective `response` is on the responses only."""

import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moe_jax.config import DataConfig
from moe_jax.data.dataset import Dataset, DatasetInfo
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.data.windows import Batch
from moe_jax.errors import InputError


class Example(NamedTuple):
  """One line of a file."""

  prompt: str
  response: str
  task: str = "all"


def read_jsonl(path: str | os.PathLike[str]) -> list[Example]:
  """Reads one JSON object per line, with texts `prompt` and `response` and, if given, `task`. Empty lines are skipped.

  Raises:
    InputError: if the file cannot be read, has no examples, or a line is broken. It says which, and what is missing.
  """
  path = pathlib.Path(path).expanduser()
  try:
    lines = path.read_text(encoding="utf-8").split("\n")
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(
      f"{path}: cannot be read as text ({getattr(error, 'strerror', None) or 'not utf-8'})"
    ) from None
  examples = [_example(f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
  if not examples:
    raise InputError(f'{path}: has no examples; a line is {{"prompt": "...", "response": "..."}}')
  return examples


def _example(where: str, line: str) -> Example:
  try:
    values = json.loads(line)
  except ValueError as error:
    raise InputError(f"{where}: is no JSON ({error})") from None
  if not isinstance(values, dict):
    raise InputError(f"{where}: must be an object with prompt and response, got {line.strip()[:40]}")
  for name in ("prompt", "response"):
    if not isinstance(values.get(name), str):
      raise InputError(f"{where}: {name} is missing or no text")
  if not values["response"]:
    raise InputError(f"{where}: response is empty, so there is nothing to learn")
  return Example(values["prompt"], values["response"], str(values.get("task", "all")))


class PromptWindows:
  """One example per row: bos, prompt, response, end, then padding.

  `is_target_BL` is True where the target is of the response, or its end.
  """

  def __init__(
    self, examples: Sequence[Example], domains: Sequence[str], tokenizer: Tokenizer, length: int, end_id: int
  ):
    rows = len(examples)
    tokens = np.full((rows, length + 1), tokenizer.pad_id, np.int32)
    counts, firsts = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
    for i, example in enumerate(examples):
      prompt, response = tokenizer.encode(example.prompt), tokenizer.encode(example.response)
      row = np.concatenate([[tokenizer.bos_id], prompt, response, [end_id]])
      if len(row) > length + 1:
        raise InputError(
          f"--sequence_length={length}: example {i + 1} has {len(row) - 1} tokens ({example.prompt[:30]!r}); choose at "
          f"least {len(row) - 1}, or shorten it"
        )
      tokens[i, : len(row)] = row
      counts[i], firsts[i] = len(row) - 1, len(prompt)
    place = np.arange(length)
    self._domain = np.array([list(domains).index(example.task) for example in examples], np.int32)
    self._tokens, self._mask = tokens, place < counts[:, None]
    self._is_target = self._mask & (place >= firsts[:, None])

  def __len__(self) -> int:
    return len(self._tokens)

  def rows(self, indices: Sequence[int]) -> Batch:
    index = np.asarray(indices, np.int64)
    return {
      "tokens_BL": self._tokens[index, :-1],
      "targets_BL": self._tokens[index, 1:],
      "mask_BL": self._mask[index],
      "domain_B": self._domain[index],
      "is_target_BL": self._is_target[index],
    }

  def targets_per_domain(self, num_domains: int) -> tuple[int, ...]:
    counts = np.bincount(self._domain, weights=self._is_target.sum(axis=1), minlength=num_domains)
    return tuple(int(n) for n in counts)

  @property
  def padded_fraction(self) -> float:
    return 1.0 - float(self._mask.mean())


class PromptDataset(Dataset):
  """A data set of prompts with responses. There are no bits per byte, because a part of the text is not predicted."""

  def validation_bytes(self, num_targets: float, limit: int = 0) -> None:
    return None


def prompt_dataset(
  config: DataConfig,
  train: Sequence[Example],
  validation: Sequence[Example],
  tokenizer: Tokenizer,
  end_id: int | None = None,
) -> PromptDataset:
  """Returns the data set of examples. Its domains are their tasks.

  Args:
    config: batch size and sequence length.
    train, validation: examples. The same prompt may not be in both.
    tokenizer: of the model.
    end_id: the token behind a response; None: `bos_id`.

  Raises:
    InputError: if an example is longer than a sequence, or a prompt is in both splits.
  """
  shared = {example.prompt for example in train} & {example.prompt for example in validation}
  if shared:
    raise InputError(
      f"validation: {len(shared)} prompts are in the training examples, too, such as {min(shared)[:40]!r}"
    )
  splits = {"train": train, "validation": validation}
  domains = tuple(sorted({example.task for examples in splits.values() for example in examples}))
  digest = hashlib.sha256(tokenizer.fingerprint.encode())
  digest.update(json.dumps({name: list(examples) for name, examples in splits.items()}).encode())
  end = tokenizer.bos_id if end_id is None else end_id
  windows = {
    name: PromptWindows(examples, domains, tokenizer, config.sequence_length, end)
    for name, examples in splits.items()
  }
  info = DatasetInfo(
    name="prompts",
    vocab_size=tokenizer.vocab_size,
    domains=domains,
    fingerprint=digest.hexdigest(),
    num_windows={name: len(w) for name, w in windows.items()},
    targets_per_domain={name: w.targets_per_domain(len(domains)) for name, w in windows.items()},
    padded_fraction={name: w.padded_fraction for name, w in windows.items()},
    num_bytes={},
    bytes_per_token=None,
    yardsticks={},
  )
  return PromptDataset(config, info, windows["train"], windows["validation"], tokenizer)
