"""The ids of a published model, and the files that come with its tokenizer, which what is made of that model keeps."""

import fnmatch
import pathlib
from typing import Any, NamedTuple

from moe_jax import disk
from moe_jax.errors import InputError

FILES = (  # around the weights of a published model: its tokenizer, its chat template, and code; as patterns
  "tokenizer.json",
  "tokenizer.model",
  "tiktoken.model",
  "tokenization_*.py",
  "configuration_*.py",
  "modeling_*.py",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.json",
  "merges.txt",
  "chat_template.jinja",
  "chat_template.json",
  "generation_config.json",
)
KEY = "model_ids"  # in the config.json of a run
_LARGEST = 2**31 - 1


class ModelIds(NamedTuple):
  """The ids of a published model, whose tokenizer gets no new ones."""

  vocab_size: int
  bos_id: int | None = None  # None: as the tokenizer and the files beside it say
  pad_id: int | None = None  # None: 0, which stands for no text because padding is masked
  stop_ids: tuple[int, ...] = ()  # that end a text
  max_positions: int = 0  # of a text that the model was made for; 0: not known


def read_ids(folder: pathlib.Path) -> ModelIds | None:
  """Returns the ids that the run in `folder` has of a published model; None if it has none, or there is no run.

  Raises:
    InputError: if they are not whole.
  """
  path = folder / "config.json"
  found = (disk.read_object(path) or {}).get(KEY)
  if found is None:
    return None
  if not _are_ids(found):
    raise InputError(
      f"{path}: {KEY}={str(found)[:60]}: must be what a run writes; copy it from the model of which this one was made"
    )
  return ModelIds(**found | {"stop_ids": tuple(found["stop_ids"])})


def _are_ids(found: Any) -> bool:
  if not isinstance(found, dict) or found.keys() != set(ModelIds._fields):
    return False
  size, stops = found["vocab_size"], found["stop_ids"]
  if not (_is_whole(size, 1, _LARGEST) and _is_whole(found["max_positions"], 0, _LARGEST)):
    return False
  ids = [i for i in (found["bos_id"], found["pad_id"]) if i is not None]
  return isinstance(stops, list) and all(_is_whole(i, 0, size - 1) for i in (*ids, *stops))


def _is_whole(value: Any, least: int, most: int) -> bool:
  return type(value) is int and least <= value <= most


def tokenizer_file(folder: pathlib.Path) -> pathlib.Path | None:
  """Returns the file of the tokenizer in the folder of a model; None if there is none that can be read."""
  files = (folder / name for name in ("tokenizer.json", "tokenizer.model"))
  return next((file for file in files if file.exists()), None)


def files_of(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the files in a folder that come with a tokenizer."""
  return [path for pattern in FILES for path in sorted(folder.glob(pattern)) if path.is_file()]


def is_file_of(name: str) -> bool:
  """Returns whether a file of this name comes with a tokenizer."""
  return any(fnmatch.fnmatchcase(name, pattern) for pattern in FILES)


def copy_files(source: pathlib.Path, folder: pathlib.Path) -> None:
  """Copies what comes with a tokenizer, byte for byte. None of it is run."""
  for path in files_of(source):
    if path.resolve() != (folder / path.name).resolve():
      disk.write_whole(folder / path.name, path.read_bytes())
