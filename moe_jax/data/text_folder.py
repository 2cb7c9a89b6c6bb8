"""`text_folder` reads your own text files. Each sub-folder of the folder is a domain."""

import hashlib
import math
import os
import stat
from pathlib import Path

from moe_jax import disk
from moe_jax.data.windows import Text
from moe_jax.errors import InputError

VALIDATION_FRACTION = 0.1  # of the files of each domain, at least one


def read_text_folder(folder: str) -> tuple[dict[str, list[Text]], tuple[str, ...]]:
  """Returns all files below `folder` by split, and the domains in alphabetical order.

  Each file is a document, read as utf-8 with invalid bytes replaced. Its domain is the first sub-folder on
  its path, or the folder's own name for files at the top, so that name is in the fingerprint of the text.
  Links are followed. Hidden and empty files are skipped, and so are pipes, devices and files with zero bytes, which
  are no text: one line says so. The files of each domain whose paths have the lowest hashes form its validation split.
  If a domain is a single file, the end of that file is the validation split. All text is held in memory.

  Raises:
    InputError: if the folder does not exist or contains no text, or if a part of it cannot be read or is a link in a
      circle: a domain must not be missing without a word.
  """
  flag = f"--text_folder={folder}"
  right = "must be a folder of text files, its sub-folders are the domains"
  root = Path(folder).expanduser()
  if not folder or not root.is_dir():
    raise InputError(f"{flag}: no such folder; {right}")
  texts: dict[str, list[tuple[str, str]]] = {}
  skipped = []
  for path in _files(root, flag):
    data = _read(path, flag)
    if data is None or b"\0" in data:
      skipped.append(path)
      continue
    text = data.decode("utf-8", errors="replace").replace("\r\n", "\n").replace("\r", "\n")
    if text.strip():
      relative = path.relative_to(root)
      domain = relative.parts[0] if len(relative.parts) > 1 else root.resolve().name
      texts.setdefault(_printable(domain), []).append((relative.as_posix(), text))
  if skipped:
    disk.note(f"{flag}: {len(skipped)} files are no text and skipped, such as {_printable(str(skipped[0]))}")
  if not texts:
    raise InputError(f"{flag}: holds no text; {right}")
  domains = tuple(sorted(texts))
  splits: dict[str, list[Text]] = {"train": [], "validation": []}
  for i, domain in enumerate(domains):
    files = sorted(texts[domain], key=lambda item: hashlib.sha256(os.fsencode(item[0])).digest())
    if len(files) == 1:
      files = _cut_in_two(files[0][1])
    cut = math.ceil(len(files) * VALIDATION_FRACTION)
    splits["validation"] += [Text(text, i) for _, text in files[:cut]]
    splits["train"] += [Text(text, i) for _, text in files[cut:]]
  return splits, domains


def _cut_in_two(text: str) -> list[tuple[str, str]]:
  """Returns two documents, the shorter first: about the last tenth of the lines, and everything before it.

  Where lines are so long that less than half of the text would be before it, a line is cut.
  """
  wanted = int(len(text) * (1 - VALIDATION_FRACTION))
  cut = text.rfind("\n", 0, wanted + 1) + 1
  cut = cut if 2 * cut >= len(text) else wanted
  return [("end", text[cut:]), ("beginning", text[:cut])]


def _files(root: Path, flag: str) -> list[Path]:
  """Returns all files below a folder that are not hidden, in the order of their paths."""
  found: list[Path] = []

  def walk(folder: Path, above: frozenset[tuple[int, int]]) -> None:
    status = _status(folder, flag)
    own = status.st_dev, status.st_ino
    if own in above:
      raise InputError(f"{flag}: {_printable(str(folder))} is a link in a circle; remove it")
    try:
      names = sorted(os.listdir(folder))
    except OSError as error:
      raise _unreadable(folder, flag, error) from None
    for name in names:
      if name.startswith("."):
        continue
      path = folder / name
      if stat.S_ISDIR(_status(path, flag).st_mode):
        walk(path, above | {own})
      else:
        found.append(path)

  walk(root, frozenset())
  return sorted(found)


def _status(path: Path, flag: str) -> os.stat_result:
  try:
    return path.stat()
  except OSError as error:
    raise _unreadable(path, flag, error) from None


def _read(path: Path, flag: str) -> bytes | None:
  """Returns the bytes of a file; None if it is a pipe or a device, which would be waited for."""
  if not stat.S_ISREG(_status(path, flag).st_mode):
    return None
  try:
    return path.read_bytes()
  except OSError as error:
    raise _unreadable(path, flag, error) from None


def _unreadable(path: Path, flag: str, error: OSError) -> InputError:
  return InputError(
    f"{flag}: {_printable(str(path))} cannot be read ({error.strerror}); make it readable, or remove it"
  )


def _printable(name: str) -> str:
  """Names may hold bytes that are not utf-8."""
  return os.fsencode(name).decode("utf-8", errors="backslashreplace")
