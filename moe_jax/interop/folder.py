"""The folder of a checkpoint in Hugging Face's form: its config.json, and its tensors in one file or several."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from moe_jax import disk
from moe_jax.errors import InputError
from moe_jax.interop.quantised import Tensor, logical_tensors
from moe_jax.interop.safetensors import open_file, short

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


class Folder(NamedTuple):
  """What `open_folder` returns. Only headers have been read."""

  path: pathlib.Path
  config: dict[str, Any]
  tensors: Mapping[str, Tensor]  # by name, in float types: quantised ones are dequantised when they are read


def read_config(path: pathlib.Path) -> dict[str, Any]:
  """Returns the values of a config.json. Raises `InputError` if there is none."""
  disk.check_not_file(path.parent)
  if not path.parent.is_dir():
    raise InputError(f"{path.parent}: no such folder")
  try:
    values = disk.parse_json(path.read_text())
  except FileNotFoundError:
    raise InputError(f"{path.parent}: holds no model ({CONFIG} is missing)") from None
  except OSError as error:
    raise InputError(f"{path}: cannot be read ({error.strerror})") from None
  except ValueError as error:
    raise InputError(f"{path}: is not JSON ({error})") from None
  if not isinstance(values, dict):
    raise InputError(f"{path}: is no configuration of a model")
  return values


def open_folder(path: pathlib.Path, config: dict[str, Any]) -> Folder:
  """Opens the files of a checkpoint.

  Raises:
    InputError: if a file is missing or torn, there are two sets of weights, or a quantised tensor lacks its scales.
  """
  stored: dict[str, np.ndarray] = {}
  for file, names in _files(path).items():
    found = open_file(path / file)
    lacking = sorted(names - found.keys())
    if lacking:
      raise InputError(
        f"{path / file}: {INDEX} puts {_some(lacking)} here, which this file does not have; use files of one checkpoint"
      )
    twice = sorted(found.keys() & stored.keys())
    if twice:
      raise InputError(f"{path / file}: {_some(twice)} is also in another file of the checkpoint")
    stored |= found
  return Folder(path, config, logical_tensors(path, stored, config))


def _files(path: pathlib.Path) -> dict[str, set[str]]:
  """The files of the checkpoint, and the tensors that the index puts into each."""
  has_single = (path / SINGLE).exists()
  if (path / INDEX).exists():
    files = _indexed(path / INDEX)
    if has_single and set(files) != {SINGLE}:  # transformers takes the single file
      raise InputError(
        f"{path}: holds two sets of weights, {SINGLE} and that of {INDEX}; move one of them away"
      )
    missing = sorted(file for file in files if not os.path.exists(path / file))  # not for a wrong name either
    if missing:
      raise InputError(f"{path}: {len(missing)} of {len(files)} files are missing: {_some(missing)}")
    return files
  if has_single:
    return {SINGLE: set()}
  others = "; it has PyTorch files, which are not read: save it again with transformers"
  there = others if any(path.glob("*.bin")) or any(path.glob("*.pt*")) else ""
  raise InputError(f"{path}: holds no weights ({SINGLE} or {INDEX}){there}")


def _indexed(index: pathlib.Path) -> dict[str, set[str]]:
  """The tensors of each file that an index names."""
  files: dict[str, set[str]] = {}
  try:
    values = disk.parse_json(index.read_bytes())
    weight_map = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(weight_map, dict):
      raise ValueError("it has no weight_map")
    for name, file in weight_map.items():
      if not isinstance(file, str) or not _is_inside(file):
        raise ValueError(f"it puts {short(name)} into {file!r:.80}, which is no file of this folder")
      files.setdefault(file, set()).add(name)
  except OSError as error:
    raise InputError(f"{index}: cannot be read ({error.strerror})") from None
  except ValueError as error:
    raise InputError(f"{index}: is no index of a checkpoint ({error})") from None
  return files


def _is_inside(file: str) -> bool:
  """Whether a name is that of a file in the folder or below it. It may be a link to one elsewhere."""
  name = pathlib.PurePath(file)
  return bool(name.parts) and not name.is_absolute() and ".." not in name.parts


def _some(names: list[str]) -> str:
  """The first names of a list, for an error."""
  return ", ".join(map(short, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
