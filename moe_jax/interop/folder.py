"""The folder of a checkpoint in Hugging Face's form: its config.json, and its tensors in one file or several."""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from moe_jax import disk
from moe_jax.errors import InputError
from moe_jax.interop.quantised import Tensor, logical_tensors
from moe_jax.interop.safetensors import open_file

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
  except (OSError, ValueError) as error:
    raise InputError(f"{path}: is not JSON ({error})") from None
  if not isinstance(values, dict):
    raise InputError(f"{path}: is no configuration of a model")
  return values


def open_folder(path: pathlib.Path, config: dict[str, Any]) -> Folder:
  """Opens the files of a checkpoint.

  Raises:
    InputError: if a file is missing or torn, or a quantised tensor lacks its scales.
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
  if (path / INDEX).exists():
    try:
      weight_map = disk.parse_json((path / INDEX).read_text())["weight_map"]
      files: dict[str, set[str]] = {}
      for name, file in weight_map.items():
        files.setdefault(file, set()).add(name)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
      raise InputError(f"{path / INDEX}: is no index of a checkpoint ({error!r})") from None
    missing = sorted(file for file in files if not (path / file).exists())
    if missing:
      raise InputError(f"{path}: {len(missing)} of {len(files)} files are missing: {_some(missing)}")
    return files
  if (path / SINGLE).exists():
    return {SINGLE: set()}
  others = "; it has PyTorch files, which are not read: save it again with transformers"
  there = others if any(path.glob("*.bin")) or any(path.glob("*.pt*")) else ""
  raise InputError(f"{path}: holds no weights ({SINGLE} or {INDEX}){there}")


def _some(names: list[str]) -> str:
  """The first names of a list, for an error."""
  return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
