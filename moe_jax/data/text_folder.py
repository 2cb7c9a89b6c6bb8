"""`text_folder` reads your own text files. Each sub-folder of the folder is a domain."""

import hashlib
import math
import os
from pathlib import Path

from moe_jax.data.windows import Text
from moe_jax.errors import InputError

VALIDATION_FRACTION = 0.1  # of the files of each domain, at least one


def read_text_folder(folder: str) -> tuple[dict[str, list[Text]], tuple[str, ...]]:
  """Returns all files below `folder` by split, and the domains in alphabetical order.

  Each file is a document, read as utf-8 with invalid bytes replaced. Its domain is the first sub-folder on
  its path, or the folder's own name for files at the top. Hidden and empty files are skipped. The files of each
  domain whose paths have the lowest hashes form its validation split. If a domain is a single file, the end of
  that file is the validation split. All text is held in memory.

  Raises:
    InputError: if the folder does not exist or contains no text.
  """
  flag = f"--text_folder={folder}"
  right = "must be a folder of text files, its sub-folders are the domains"
  root = Path(folder).expanduser()
  if not folder or not root.is_dir():
    raise InputError(f"{flag}: no such folder; {right}")
  texts: dict[str, list[tuple[str, str]]] = {}
  for path in _files(root):
    text = path.read_text(encoding="utf-8", errors="replace")
    if text.strip():
      relative = path.relative_to(root)
      domain = relative.parts[0] if len(relative.parts) > 1 else root.resolve().name
      texts.setdefault(domain, []).append((relative.as_posix(), text))
  if not texts:
    raise InputError(f"{flag}: holds no text; {right}")
  domains = tuple(sorted(texts))
  splits: dict[str, list[Text]] = {"train": [], "validation": []}
  for i, domain in enumerate(domains):
    files = sorted(texts[domain], key=lambda item: hashlib.sha256(item[0].encode()).digest())
    if len(files) == 1:
      files = _cut_in_two(files[0][1])
    cut = math.ceil(len(files) * VALIDATION_FRACTION)
    splits["validation"] += [Text(text, i) for _, text in files[:cut]]
    splits["train"] += [Text(text, i) for _, text in files[cut:]]
  return splits, domains


def _cut_in_two(text: str) -> list[tuple[str, str]]:
  """Returns two documents, the shorter first: about the last tenth of the lines, and everything before it."""
  cut = text.rfind("\n", 0, int(len(text) * (1 - VALIDATION_FRACTION)) + 1) + 1
  return [("end", text[cut:]), ("beginning", text[:cut])]


def _files(root: Path) -> list[Path]:
  found = []
  for folder, subfolders, names in os.walk(root):
    subfolders[:] = [s for s in subfolders if not s.startswith(".")]
    found += [Path(folder, name) for name in names if not name.startswith(".")]
  return sorted(found)
