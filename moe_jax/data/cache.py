"""Files that are derived from a corpus and kept beside it: trained tokenizers, token ids, yardsticks.

A missing file is made again, so a folder that cannot be written costs time and nothing else.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from moe_jax import disk
from moe_jax.config import DataConfig
from moe_jax.errors import InputError


def data_dir(config: DataConfig) -> Path:
  """Returns `config.data_dir`, or $MOE_JAX_DATA_DIR, or ~/.cache/moe_jax."""
  return Path(config.data_dir or os.environ.get("MOE_JAX_DATA_DIR") or "~/.cache/moe_jax").expanduser()


def cache_dir(config: DataConfig) -> Path:
  """Returns the local folder of derived files: `data_dir`, or the default if that is a bucket such as gs://."""
  return data_dir(DataConfig() if "://" in config.data_dir else config)


def texts_key(texts: Iterable[str]) -> str:
  """Returns 16 hexadecimal digits that identify these texts in this order."""
  digest = hashlib.sha256()
  for text in texts:
    data = text.encode(errors="replace")
    digest.update(f"{len(data)}\0".encode())
    digest.update(data)
  return digest.hexdigest()[:16]


def keep(path: Path, data: bytes) -> None:
  """Writes a file and its digest if the folder can be written."""
  with contextlib.suppress(OSError):
    disk.write_whole(path, data)
    disk.write_whole(_digest_file(path), hashlib.sha256(data).hexdigest().encode())


def read(path: Path) -> bytes | None:
  """Returns the bytes of a file that `keep` wrote; None if it is not there, cannot be read, or is damaged.

  A damaged file is moved aside, and is made again by the caller.

  Raises:
    InputError: if a damaged file cannot be moved, and would be overwritten.
  """
  try:
    data, digest = path.read_bytes(), _digest_file(path).read_bytes()
  except OSError:
    return None
  if hashlib.sha256(data).hexdigest().encode() == digest:
    return data
  try:
    place = f"moved to {disk.move_aside(path, path.parent)}"
  except InputError:
    # Otherwise another process has moved it, or nothing is kept.
    if path.exists() and os.access(path.parent, os.W_OK):
      raise
    place = "and stays where it is, or was moved by another process"
  disk.note(f"{path}: is damaged, {place}; it is made again")
  return None


def _digest_file(path: Path) -> Path:
  return path.with_name(f"{path.name}.sha256")
