"""Numbers that are measured once: a command that was interrupted goes on where it was, and refuses those of other settings."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from moe_jax import disk
from moe_jax.config import Config
from moe_jax.errors import InputError
from moe_jax.training.identity import changes, differences


class Kept:
  """The measured numbers of one command, as JSON files in a folder: `kept("rows/int8", measure)`.

  Args:
    folder: new, or that of an earlier command.
    settings: JSON values that the numbers depend on.
    config: of trainings that they depend on, too. What may change when a run continues may change here.

  Raises:
    InputError: if the folder has numbers of other settings.
  """

  def __init__(self, folder: pathlib.Path, settings: Mapping[str, Any], config: Config | None = None):
    disk.check_folder(folder)
    self.folder, self.path = folder, folder / "settings.json"
    self.settings = dict(settings) | ({"config": config.to_dict()} if config else {})
    known, own = disk.read_object(self.path), dict(self.settings)
    changed = changes(known.pop("config"), own.pop("config")) if known and config else []
    changed += differences(known, own) if known else []
    if changed:
      raise InputError(
        f"--output_dir={folder}: holds numbers of other settings ({'; '.join(changed[:3])}); choose another folder"
      )

  def __call__(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns what is kept in the file `name`.json, or what `make` returns, which is kept."""
    path = self.folder / f"{name}.json"
    found = disk.read_object(path)
    if not found:
      made = make()
      disk.write_json(self.path, self.settings)
      disk.write_json(path, made)
      found = disk.read_object(path)
    return found
