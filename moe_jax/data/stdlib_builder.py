"""Builds `stdlib`, the standard-library corpus, as a TFDS data set in ArrayRecord format, and caches it."""

import contextlib
import hashlib
import io
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from moe_jax import disk
from moe_jax.data import stdlib_text
from moe_jax.data.windows import Text
from moe_jax.errors import InputError, is_of_the_machine

_SPLITS = ("train", "validation")
_DIGEST = "digest.txt"  # in the folder of the corpus: of its text, as it was built


class MoeStdlib(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Features: text, domain. Splits by document: train, validation. See `moe_jax.data.stdlib_text`."""

  VERSION = tfds.core.Version(
    "1.0.0"
  )  # part of the cache key: raise it whenever stdlib_text changes the text
  # No checksum file: looking for one needs importlib_resources, which TFDS does not install.
  url_infos = None
  _checksums_path = None

  def __init__(self, *, root: Path, **kwargs):
    self._root = root
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=stdlib_text.__doc__,
      features=tfds.features.FeaturesDict(
        {
          "text": tfds.features.Text(),
          "domain": tfds.features.ClassLabel(names=stdlib_text.DOMAINS),
        }
      ),
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing is downloaded
    documents = stdlib_text.read_documents(self._root)
    return {s: self._generate_examples([d for d in documents if d.split == s]) for s in _SPLITS}

  def _generate_examples(self, documents) -> Iterator[tuple[str, dict[str, str]]]:
    # TFDS orders examples by the hash of the key, so the order is deterministic and the domains are mixed.
    for i, document in enumerate(documents):
      yield f"{document.domain}-{i}", {"text": document.text, "domain": document.domain}


def read_stdlib(data_dir: Path, root: Path | None = None) -> tuple[dict[str, list[Text]], tuple[str, ...]]:
  """Returns the corpus by split, and its domains. Builds the corpus on first use.

  Args:
    data_dir: the cache folder, created if missing. Several processes may build at the same time.
    root: the library to read; None: that of the running interpreter.

  Raises:
    InputError: if the corpus is there and the machine cannot read it now, or it is damaged and cannot be moved.
  """
  root = root or stdlib_text.stdlib_root()
  folder = data_dir / "stdlib" / _cache_key(root)
  if not folder.is_dir():
    _build(root, folder)
  try:
    return _read(folder)
  except Exception as error:  # whatever damaged bytes lead to
    if is_of_the_machine(error):
      raise InputError(
        f"{folder}: cannot be read now ({_first_line(error)}), which does not say that it is damaged; nothing was changed, "
        "and the same command reads it when it can be read"
      ) from error
    what = f"is damaged ({_first_line(error)})"
    try:
      place = f"moved to {disk.move_aside(folder, folder.parent, what)}"
    except InputError:
      if folder.exists():
        raise
      place = "moved by another process"
    disk.note(f"{folder}: {what}, {place}; it is built again")
  _build(root, folder)
  return _read(folder)


def _read(folder: Path) -> tuple[dict[str, list[Text]], tuple[str, ...]]:
  builder = tfds.builder_from_directory(folder)
  names = builder.info.features["domain"].names
  raw = {
    split: [(example["text"].decode(), names[example["domain"]]) for example in builder.as_data_source(split)]
    for split in _SPLITS
  }
  if (folder / _DIGEST).read_text() != _digest(raw):
    raise ValueError("its text does not have the digest of the built one")
  present = {domain for examples in raw.values() for _, domain in examples}
  domains = tuple(d for d in names if d in present)
  return {s: [Text(text, domains.index(d)) for text, d in examples] for s, examples in raw.items()}, domains


def _digest(raw: dict[str, list[tuple[str, str]]]) -> str:
  digest = hashlib.sha256()
  for split in _SPLITS:
    for text, domain in raw[split]:
      data = text.encode()
      digest.update(f"{split}\0{domain}\0{len(data)}\0".encode() + data)
  return digest.hexdigest()


def _first_line(error: Exception) -> str:
  return " ".join(f"{type(error).__name__}: {error}".split())[:120]


def _cache_key(root: Path) -> str:
  """Builder version, Python version, and a hash of the paths and sizes of all candidate files.

  The key uses sizes because reading the contents takes seconds. `DatasetInfo.fingerprint` covers the contents.
  """
  listing = repr((sys.version, sorted(stdlib_text.list_files(root))))
  version = ".".join(map(str, sys.version_info[:3]))
  return f"v{MoeStdlib.VERSION}-py{version}-{hashlib.sha256(listing.encode()).hexdigest()[:12]}"


def _build(root: Path, folder: Path) -> None:
  """Builds in a temporary folder and renames it, so that `folder` is complete or absent even if others build it."""
  start = time.monotonic()
  folder.parent.mkdir(parents=True, exist_ok=True)
  scratch = tempfile.mkdtemp(prefix=".building-", dir=folder.parent)
  print(f"building the stdlib corpus from {root} in {folder} (once)", file=sys.stderr)
  try:
    builder = MoeStdlib(root=root, data_dir=scratch, file_format="array_record")
    with _quiet_tfds():
      builder.download_and_prepare()
    built = {
      split: [(e["text"].decode(), stdlib_text.DOMAINS[e["domain"]]) for e in builder.as_data_source(split)]
      for split in _SPLITS
    }
    disk.write_text(Path(builder.data_path) / _DIGEST, _digest(built))
    try:
      os.rename(builder.data_path, folder)
    except OSError:
      if not folder.is_dir():  # otherwise another process finished the same build first
        raise
  finally:
    shutil.rmtree(scratch, ignore_errors=True)
  print(f"built the stdlib corpus in {time.monotonic() - start:.1f} s", file=sys.stderr)


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
  """Silences the download messages and progress bars, which are meaningless for a local build."""
  with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    yield
