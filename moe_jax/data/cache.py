"""Files that are derived from a corpus and kept beside it: trained tokenizers, token ids, yardsticks.

A missing file is made again, so a folder that cannot be written costs time and nothing else.
"""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from moe_jax.config import DataConfig


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


def write_whole(path: Path, data: bytes) -> None:
  """Writes a file in one rename, so that a file that exists is whole. Makes its folder."""
  path.parent.mkdir(parents=True, exist_ok=True)
  handle, temporary = tempfile.mkstemp(prefix=".", dir=path.parent)
  try:
    with os.fdopen(handle, "wb") as file:
      file.write(data)
    os.chmod(temporary, 0o644)  # mkstemp's files are only for their owner; the corpus is for everyone
    os.replace(temporary, path)
  finally:
    Path(temporary).unlink(missing_ok=True)


def keep(path: Path, data: bytes) -> None:
  """Writes a file if the folder can be written."""
  with contextlib.suppress(OSError):
    write_whole(path, data)


def read(path: Path) -> bytes | None:
  """Returns the bytes of a file; None if it is not there or cannot be read."""
  try:
    return path.read_bytes()
  except OSError:
    return None
