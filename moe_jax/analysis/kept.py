"""Numbers that are measured once: a command that was interrupted goes on where it was, and refuses those of other settings."""

import contextlib
import pathlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from moe_jax import disk
from moe_jax.cluster import processes
from moe_jax.config import Config
from moe_jax.config.plain import is_other_code, own_code
from moe_jax.data.text_folder import check_outside
from moe_jax.errors import InputError
from moe_jax.fingerprint import of_package
from moe_jax.training import identity
from moe_jax.training.changes import changes, differences
from moe_jax.training.compiled import resolve_config

_SETTINGS = "settings"  # in a kept file, those of its numbers
_CODE = "code"  # the digest of moe_jax that measured them
_OWN = "own code"  # in the settings, see `own_code`


class Kept:
  """The measured numbers of one command, as JSON files in a folder: `kept("rows/int8", measure)`.

  Each file has its settings and a digest. One that is damaged is moved aside, and measured again. With several processes,
  all make the same calls, and process 0 reads and writes.

  Args:
    folder: new, or that of an earlier command. From the first number on until this object is gone, no other command may measure there.
    settings: JSON values that the numbers depend on.
    config: of trainings that they depend on, too. What may change when a run continues may change here, but for more steps.
      With it, numbers by other code of a user's method are refused. Numbers by other code of moe_jax are kept, and one
      line says so.

  Raises:
    InputError: if the folder has numbers of other settings, or is in that of the text.
  """

  def __init__(self, folder: pathlib.Path, settings: Mapping[str, Any], config: Config | None = None):
    disk.check_folder(folder)
    self.folder, self.path = folder, folder / "settings.json"
    self.settings = dict(settings)
    if config:
      check_outside(folder, config.data)
      self.settings |= {"config": config.to_dict(), "num_steps": config.train.num_steps}
      if own := own_code(resolve_config(config)):
        self.settings[_OWN] = own
    self._noted, self._holds = False, False
    self._held = contextlib.ExitStack()
    weakref.finalize(self, self._held.close)  # at the latest when the process ends
    if processes.is_first():  # where it fails, the others are stopped with its message
      self._check(self._read(self.path, "each of the numbers has its settings, too"))

  def __call__(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns what is kept in the file `name`.json, or what `make` returns, which is kept.

    Raises:
      InputError: if it is of other settings, or if another command measures in the folder.
    """
    path = self.folder / f"{name}.json"
    # Not for each number: between two, models and text are read, and a second command would take over.
    if not self._holds:
      self._held.enter_context(identity.hold([(self.folder, f"--output_dir={self.folder}")]))
      self._holds = True
    found = processes.from_first(self._found(path) if processes.is_first() else None)
    if found is None:
      with self._said():
        made = make()
      if processes.is_first():
        disk.write_json(path, disk.with_digest(made | {_SETTINGS: self.settings, _CODE: of_package()}))
      found = processes.from_first(self._found(path) if processes.is_first() else None)
    return found

  @contextlib.contextmanager
  def _said(self) -> Iterator[None]:
    """The folder says its settings while the first number is made, too: a kill may leave what they made.

    Wrong input leaves none, so it can be corrected.
    """
    is_new = processes.is_first() and not self.path.exists()
    if processes.is_first():
      disk.write_json(self.path, disk.with_digest(self.settings))
    try:
      yield
    except InputError:
      if is_new:
        self.path.unlink(missing_ok=True)
      raise

  def _found(self, path: pathlib.Path) -> dict[str, Any] | None:
    """Returns the numbers in a file; None if there is none that is whole."""
    found = self._read(path, "it is measured again")
    if found is None:
      return None
    self._check(found.pop(_SETTINGS))
    code, here = found.pop(_CODE, None), of_package()
    if code not in (None, here) and not self._noted:
      self._noted = True
      disk.note(f"{path}: was measured by other code of moe_jax (digest {code}, now {here}), and is kept")
    return found

  def _read(self, path: pathlib.Path, consequence: str) -> dict[str, Any] | None:
    of_numbers = path != self.path
    is_whole = lambda value: (
      disk.DIGEST in value and disk.has_its_digest(value) and (_SETTINGS in value or not of_numbers)
    )
    disk.set_aside_damaged(path, self.folder, consequence, is_whole)
    found = disk.read_object(path)
    return found and {key: value for key, value in found.items() if key != disk.DIGEST}

  def _check(self, known: dict[str, Any] | None) -> None:
    if not known:
      return
    known, own = dict(known), dict(self.settings)
    if not is_other_code(known.get(_OWN, []), own.get(_OWN, [])):
      known[_OWN] = own[_OWN] = own.get(_OWN, [])
    changed = changes(known.pop("config", {}), own.pop("config")) if "config" in own else []
    changed = list(dict.fromkeys([*changed, *differences(known, own)]))
    if changed:
      raise InputError(
        f"--output_dir={self.folder}: holds numbers of other settings ({'; '.join(changed[:3])}); choose another folder"
      )
