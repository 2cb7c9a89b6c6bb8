"""Models that a command makes of others: each folder says what its model was made of, and is there whole or not at all."""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from flax import nnx

from moe_jax import disk
from moe_jax.cluster import processes
from moe_jax.data.model_ids import is_file_of
from moe_jax.errors import InputError, of_the_disk
from moe_jax.nn.transformer import Transformer
from moe_jax.training.changes import differences
from moe_jax.training.digests import tree_digest
from moe_jax.training.load import CHECKPOINTS, CONFIG_FILE
from moe_jax.training.reading import read_beside

MADE_OF = "made_of.json"  # in the folder of a model
ONLY_MODEL = {"model": True}  # saved beside the arrays of a model that was not trained in its folder


def source_of(model: Transformer, step: int | None = None, **settings: Any) -> dict[str, Any]:
  """Returns what another model is made of, for `is_made` and `save_model`: JSON values.

  Args:
    model: of which it is made.
    step: of that model; None: not known.
    settings: of the making that the configuration of what is made does not have.
  """
  of_step = {} if step is None else {"step": step}
  return {**of_step, "digest": tree_digest(nnx.state(model, nnx.Param)), **settings}


def is_made(folder: pathlib.Path, source: Mapping[str, Any]) -> bool:
  """Returns, in all processes, whether the folder holds a model that was made of `source`.

  Args:
    folder: that `save_model` writes.
    source: of `source_of`, or the part of it that is known.

  Raises:
    InputError: if it was made of another source, or does not say of which.
  """
  is_whole, found = processes.from_first(_read(folder) if processes.is_first() else None)
  if not is_whole:
    return False
  if found is None:
    raise InputError(
      f"{folder}: does not say which model it was made of ({MADE_OF} is missing or not whole); choose another folder"
    )
  if changed := _differences(found, source):
    raise InputError(f"{folder}: was made of another model ({'; '.join(changed)}); choose another folder")
  return True


def is_current(folder: pathlib.Path, source: Mapping[str, Any]) -> bool:
  """Returns what `is_made` does for the result of a command, which is written again where `source` is another: it is moved aside.

  Raises:
    InputError: in all processes, if it cannot be moved.
  """
  is_whole, found = processes.from_first(_read(folder) if processes.is_first() else None)
  changed = _differences(found or {}, source)
  if is_whole and changed:
    with processes.refused_together():
      if processes.is_first():
        what = f"is of another model ({'; '.join(changed)})"
        place = disk.move_aside(folder, folder.parent, what)
        disk.note(f"{folder}: {what}, moved to {place}; it is written again")
  return is_whole and not changed


def _differences(found: Mapping[str, Any], source: Mapping[str, Any]) -> list[str]:
  """Returns a text for each part of `source` that is another one in `found`."""
  return differences({name: found.get(name) for name in source}, dict(source))


def _read(folder: pathlib.Path) -> tuple[bool, dict[str, Any] | None]:
  """Returns whether there is a whole model, and what it was made of. One that does not say its seed has that of its configuration."""
  config, found = disk.read_object(folder / CONFIG_FILE), disk.read_object(folder / MADE_OF)
  if config and found:
    found = {"seed": config.get("train", {}).get("seed")} | found
  return config is not None, found


@contextlib.contextmanager
def new_model(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """A folder to fill with a model, which gets its name when it is whole. In one process.

  Raises:
    Taken: if the folder has something else, or another command makes it in the meantime.
    InputError: if what is not whole there cannot be moved, or the disk is full.
  """
  if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
    if not _is_unfinished(folder):
      raise disk.Taken(f"{folder}: has a run or a model already; choose another folder")
    what = f"its {CONFIG_FILE} is missing or not whole"
    place = disk.move_aside(folder, folder.parent, what)
    disk.note(f"{folder}: {what}, moved to {place}; it is written again")
  try:
    with disk.whole_folder(folder) as new:
      yield new
  except Exception as error:
    if line := of_the_disk(error, str(folder), "begins it anew"):
      raise line from error
    raise


def _is_unfinished(folder: pathlib.Path) -> bool:
  """Returns whether there is only a model, untrained in this folder, that nothing can load without its configuration."""
  own = lambda name: name in (CHECKPOINTS, CONFIG_FILE, MADE_OF) or is_file_of(name)
  if not folder.is_dir() or any(
    not own(p.name) and not p.name.startswith(disk.WRITING) for p in folder.iterdir()
  ):
    return False
  steps = [path for path in (folder / CHECKPOINTS).glob("*") if path.name.isdecimal()]
  kept = [read_beside(path).kept for path in steps]
  return disk.read_object(folder / CONFIG_FILE) is None and all(k and k["extra"] == ONLY_MODEL for k in kept)
