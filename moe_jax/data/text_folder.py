"""`text_folder` reads your own text files. Each sub-folder of the folder is a domain."""

import hashlib
import math
import os
import stat
from pathlib import Path
from typing import NamedTuple

from moe_jax import disk
from moe_jax.config import DataConfig
from moe_jax.data.windows import Text, text_digest
from moe_jax.errors import InputError

VALIDATION_FRACTION = 0.1  # of the files of each domain, at least one


class _Document(NamedTuple):
  """A file of text."""

  path: str  # below the folder
  domain: str
  text: str


def read_text_folder(folder: str) -> tuple[dict[str, list[Text]], tuple[str, ...]]:
  """Returns all files below `folder` by split, and the domains in alphabetical order.

  Each file is a document, read as utf-8 with invalid bytes replaced and without a byte order mark. Its domain is the
  first sub-folder on its path, or the folder's own name for files at the top, so that name is in the fingerprint of the text.
  Links are followed. Hidden and empty files are skipped, and so are pipes, devices and files with zero bytes, which
  are no text. The files of each domain whose paths have the lowest hashes form its validation split.
  Equal documents, also of several domains, are in one split: they count once, as the one whose path is first.
  If a domain has a single one, the end of that text is the validation split. All text is held in memory.
  One line each says how many files are skipped, are not utf-8, or have a copy.

  Raises:
    InputError: if the folder does not exist or contains no text, or if a part of it cannot be read or is a link in a
      circle: a domain must not be missing without a word.
  """
  flag = f"--text_folder={folder}"
  right = "must be a folder of text files, its sub-folders are the domains"
  root = Path(folder).expanduser()
  if not folder or not root.is_dir():
    raise InputError(f"{flag}: no such folder; {right}")
  documents = _documents(root, flag)
  if not documents:
    raise InputError(f"{flag}: holds no text; {right}")
  domains = tuple(sorted({document.domain for document in documents}))
  digests = [text_digest(document.text) for document in documents]
  if copies := len(digests) - len(set(digests)):
    disk.note(
      f"{flag}: {copies} of {len(digests)} files are copies of another one; training and validation share none of them"
    )
  places = _places(documents, digests)
  splits: dict[str, list[Text]] = {"train": [], "validation": []}
  in_order = sorted(zip(documents, digests, strict=True), key=lambda item: (item[0].domain, _hash(item[0])))
  for document, digest in in_order:
    split, i = places[digest], domains.index(document.domain)
    if split in splits:
      splits[split].append(Text(document.text, i))
    else:
      for part, text in _cut_in_two(document.text).items():
        splits[part].append(Text(text, i))
  return splits, domains


def check_outside(folder: str | os.PathLike[str], data: DataConfig) -> None:
  """Raises `InputError` if what is written to a folder would be text of the data: it is in their folder of text, and not hidden there."""
  text = os.path.expanduser(data.text_folder)
  if data.dataset != "text_folder" or not os.path.isdir(text):  # what is wrong with it, reading it says
    return
  root, written = Path(os.path.realpath(text)), Path(os.path.realpath(folder))
  if written.is_relative_to(root) and not any(p.startswith(".") for p in written.relative_to(root).parts):
    raise InputError(
      f"{os.fspath(folder)}: is in the folder of the text, --text_folder={data.text_folder}, so its files would become text; "
      "choose another folder"
    )


def _documents(root: Path, flag: str) -> list[_Document]:
  """Returns the files that hold text, in the order of their paths."""
  documents: list[_Document] = []
  skipped, replaced = [], []
  for path in _files(root, flag):
    data = _read(path, flag)
    if data is None or b"\0" in data:
      skipped.append(path)
      continue
    text = data.decode("utf-8-sig", errors="replace").replace("\r\n", "\n").replace("\r", "\n")
    if text.strip():
      relative = path.relative_to(root)
      domain = relative.parts[0] if len(relative.parts) > 1 else root.resolve().name
      documents.append(_Document(relative.as_posix(), _printable(domain), text))
      if "\ufffd" in text and not _is_utf8(data):
        replaced.append(path)
  for paths, what in (
    (skipped, "no text and skipped"),
    (replaced, "not utf-8, and wrong bytes read as U+FFFD"),
  ):
    if paths:
      disk.note(f"{flag}: {len(paths)} files are {what}, such as {_printable(str(paths[0]))}")
  return documents


def _places(documents: list[_Document], digests: list[bytes]) -> dict[bytes, str]:
  """Returns where each text goes, by its digest: `train`, `validation`, or `both` if it is cut in two.

  It is decided in the domain of the first of equal documents, so that a copy in another domain does not tell.
  """
  texts: dict[str, dict[bytes, _Document]] = {}  # of each domain, by digest
  seen: set[bytes] = set()
  for document, digest in zip(documents, digests, strict=True):
    if digest not in seen:
      seen.add(digest)
      texts.setdefault(document.domain, {})[digest] = document
  places: dict[bytes, str] = {}
  for of_domain in texts.values():
    ordered = sorted(of_domain, key=lambda digest: _hash(of_domain[digest]))
    cut = math.ceil(len(ordered) * VALIDATION_FRACTION)
    for i, digest in enumerate(ordered):
      places[digest] = "both" if len(ordered) == 1 else "validation" if i < cut else "train"
  return places


def _hash(document: _Document) -> bytes:
  return hashlib.sha256(os.fsencode(document.path)).digest()


def _is_utf8(data: bytes) -> bool:
  try:
    data.decode()
  except UnicodeDecodeError:
    return False
  return True


def _cut_in_two(text: str) -> dict[str, str]:
  """Returns a document of each split: about the last tenth of the lines is validation, everything before it training.

  Where lines are so long that less than half of the text would be before it, a line is cut.
  """
  wanted = int(len(text) * (1 - VALIDATION_FRACTION))
  cut = text.rfind("\n", 0, wanted + 1) + 1
  cut = cut if 2 * cut >= len(text) else wanted
  return {"train": text[:cut], "validation": text[cut:]}


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
