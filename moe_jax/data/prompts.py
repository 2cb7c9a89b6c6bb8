"""Prompts with responses, from JSONL files. The loss of objective `response` is on the responses only."""

import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moe_jax import disk
from moe_jax.config import DataConfig
from moe_jax.data.chat import ChatTemplate
from moe_jax.data.dataset import Dataset, DatasetInfo
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.data.windows import Batch
from moe_jax.errors import InputError

MIN_ROOM = 8  # a packed row with less room than so many positions takes no further example


class Example(NamedTuple):
  """One line of a file."""

  prompt: str
  response: str
  task: str = "all"


def read_jsonl(path: str | os.PathLike[str]) -> list[Example]:
  """Reads one JSON object per line, with texts `prompt` and `response` and, if given, `task`. Empty lines are skipped.

  A byte order mark, with which editors may begin a file, is skipped, too.

  Raises:
    InputError: if the file cannot be read, has no examples, or a line is broken. It says which, and what is missing.
  """
  path = pathlib.Path(path).expanduser()
  try:
    lines = path.read_text(encoding="utf-8-sig").split("\n")
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(
      f"{path}: cannot be read as text ({getattr(error, 'strerror', None) or 'not utf-8'})"
    ) from None
  examples = [_example(f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
  if not examples:
    raise InputError(f'{path}: has no examples; a line is {{"prompt": "...", "response": "..."}}')
  return examples


def write_jsonl(path: str | os.PathLike[str], examples: Sequence[Example]) -> None:
  """Writes examples as `read_jsonl` reads them."""
  lines = (json.dumps(example._asdict()) + "\n" for example in examples)
  disk.write_whole(pathlib.Path(path), "".join(lines).encode())


def _example(where: str, line: str) -> Example:
  try:
    values = disk.parse_json(line)
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


class Tokens(NamedTuple):
  """An example as tokens: the prompt with what comes before it, then the response with its end."""

  ids: np.ndarray
  first: int  # the place of the first token of the response


def encode_example(
  example: Example, tokenizer: Tokenizer, end_id: int, template: ChatTemplate | None = None
) -> Tokens:
  """Returns bos, prompt, response and `end_id`; with a template, what it writes, which has its own beginning and end.

  What a template writes is encoded as one text. The response begins with the first token that the prompt alone does not begin
  with, so one that has characters of both is of the response.
  """
  if template is None:
    prompt, response = tokenizer.encode(example.prompt), tokenizer.encode(example.response)
    return Tokens(np.concatenate([[tokenizer.begin_id()], prompt, response, [end_id]]), 1 + len(prompt))
  before, response = template.split(example.prompt, example.response)
  prompt, whole = tokenizer.encode(before), tokenizer.encode(before + response)
  n = min(len(prompt), len(whole) - 1)
  differs = np.flatnonzero(prompt[:n] != whole[:n])
  return Tokens(whole, max(int(differs[0]) if differs.size else n, 1))


def fits_row(example: Example, tokenizer: Tokenizer, length: int) -> bool:
  """Returns whether an example has at most `length` targets, prompt and end included."""
  return len(encode_example(example, tokenizer, tokenizer.bos_id).ids) <= length + 1


class PromptWindows:
  """Rows of examples, then padding: one example each, or several of one task.

  `is_target_BL` is True where the target is of a response, or its end. In a packed row, `segment_BL` numbers the examples from 0,
  so that they do not see each other.
  """

  def __init__(
    self,
    examples: Sequence[Tokens],
    domains: Sequence[int],
    length: int,
    pad_id: int,
    pack: bool = False,
  ):
    lengths = [len(tokens.ids) - 1 for tokens in examples]
    row_of, begin_of, rows = place(lengths, domains, length) if pack else _one_each(len(examples))
    self._tokens = np.full((rows, length), pad_id, np.int32)
    self._targets = np.full((rows, length), pad_id, np.int32)
    self._mask, self._is_target = np.zeros((rows, length), bool), np.zeros((rows, length), bool)
    self._segment = np.zeros((rows, length), np.int32) if pack else None
    self._domain = np.zeros(rows, np.int32)
    num_in_row = np.zeros(rows, np.int32)
    for tokens, domain, row, begin, n in zip(examples, domains, row_of, begin_of, lengths, strict=True):
      here = np.s_[row, begin : begin + n]
      self._tokens[here], self._targets[here], self._mask[here] = tokens.ids[:-1], tokens.ids[1:], True
      self._is_target[row, begin + tokens.first - 1 : begin + n] = True
      self._domain[row] = domain
      if pack:
        self._segment[row, begin:] = num_in_row[row]  # padding behind the last example is of it, and masked
      num_in_row[row] += 1

  def __len__(self) -> int:
    return len(self._tokens)

  def rows(self, indices: Sequence[int]) -> Batch:
    index = np.asarray(indices, np.int64)
    packed = {} if self._segment is None else {"segment_BL": self._segment[index]}
    return {
      "tokens_BL": self._tokens[index],
      "targets_BL": self._targets[index],
      "mask_BL": self._mask[index],
      "domain_B": self._domain[index],
      "is_target_BL": self._is_target[index],
      **packed,
    }

  def targets_per_domain(self, num_domains: int) -> tuple[int, ...]:
    counts = np.bincount(self._domain, weights=self._is_target.sum(axis=1), minlength=num_domains)
    return tuple(int(n) for n in counts)

  @property
  def padded_fraction(self) -> float:
    return 1.0 - float(self._mask.mean())


def _one_each(number: int) -> tuple[Sequence[int], Sequence[int], int]:
  return range(number), [0] * number, number


def place(lengths: Sequence[int], domains: Sequence[int], length: int) -> tuple[list[int], list[int], int]:
  """Returns (row of each example, its first position, number of rows): each goes to the first row of its domain with room."""
  row_of, begin_of, used = [], [], []
  open_rows: dict[int, list[int]] = {}
  for n, domain in zip(lengths, domains, strict=True):
    mine = open_rows.setdefault(domain, [])
    row = next((row for row in mine if used[row] + n <= length), None)
    if row is None:
      row = len(used)
      used.append(0)
      mine.append(row)
    row_of.append(row)
    begin_of.append(used[row])
    used[row] += n
    if used[row] > length - MIN_ROOM:
      mine.remove(row)
  return row_of, begin_of, len(used)


class PromptDataset(Dataset):
  """A data set of prompts with responses. There are no bits per byte, because a part of the text is not predicted."""

  def validation_bytes(self, num_targets: float, limit: int = 0) -> None:
    return None

  def bytes_of_rows(self, batch: Batch) -> np.ndarray:
    return np.zeros(len(batch["targets_BL"]))


def prompt_dataset(
  config: DataConfig,
  train: Sequence[Example],
  validation: Sequence[Example],
  tokenizer: Tokenizer,
  end_id: int | None = None,
  template: ChatTemplate | None = None,
  name: str = "prompts",
) -> PromptDataset:
  """Returns the data set of examples. Its domains are their tasks.

  Args:
    config: batch size, sequence length, and whether to pack.
    train, validation: examples. The same prompt may not be in both.
    tokenizer: of the model.
    end_id: the token behind a response; None: the first that ends a text of the published model that the tokenizer came with,
      otherwise `bos_id`. A template writes its own.
    template: of the conversations that the model knows; None: prompt and response follow each other.
    name: of the data set, in results.

  Raises:
    InputError: if an example is longer than a sequence, a prompt is in both splits, or the template cannot be used.
  """
  shared = {example.prompt for example in train} & {example.prompt for example in validation}
  if shared:
    raise InputError(
      f"validation: {len(shared)} prompts are in the training examples, too, such as {min(shared)[:40]!r}"
    )
  splits = {"train": train, "validation": validation}
  domains = sorted({example.task for examples in splits.values() for example in examples})
  digest = hashlib.sha256(tokenizer.fingerprint.encode())
  digest.update(json.dumps({name: list(examples) for name, examples in splits.items()}).encode())
  digest.update(template.source.encode() if template else b"")
  stop_ids = tokenizer.ids.stop_ids if tokenizer.ids else ()
  end = next((i for i in (end_id, *stop_ids) if i is not None), tokenizer.bos_id)
  if end != tokenizer.bos_id and template is None:
    digest.update(f" end {end}".encode())
  windows = {}
  for split, examples in splits.items():
    encoded = [encode_example(example, tokenizer, end, template) for example in examples]
    _check_lengths(examples, encoded, config.sequence_length)
    of_task = [domains.index(example.task) for example in examples]
    sizes = (config.sequence_length, tokenizer.pad_id)
    windows[split] = PromptWindows(encoded, of_task, *sizes, pack=config.pack_examples)
  info = DatasetInfo(
    name=name,
    vocab_size=tokenizer.vocab_size,
    domains=tuple(domains),
    fingerprint=digest.hexdigest(),
    num_windows={name: len(w) for name, w in windows.items()},
    targets_per_domain={name: w.targets_per_domain(len(domains)) for name, w in windows.items()},
    padded_fraction={name: w.padded_fraction for name, w in windows.items()},
    num_bytes={},
    bytes_per_domain={},
    bytes_per_token=None,
    yardsticks={},
  )
  return PromptDataset(config, info, windows["train"], windows["validation"], tokenizer)


def _check_lengths(examples: Sequence[Example], encoded: Sequence[Tokens], length: int) -> None:
  for i, (example, tokens) in enumerate(zip(examples, encoded, strict=True), 1):
    n = len(tokens.ids) - 1
    if n > length:
      raise InputError(
        f"--sequence_length={length}: example {i} has {n} tokens ({example.prompt[:30]!r}); choose at least {n}, or "
        "shorten it"
      )
