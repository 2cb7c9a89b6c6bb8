"""Router logits of a training run on disk: recorded once, replayed under other balancers (`moe_jax.analysis.replay`).

A trace is a folder of header.json and steps_<first step>.npy files. Each file is an array of records, one per
recorded step, which `numpy.load(..., mmap_mode="r")` reads anywhere. A file gets its name when it is whole, so a
killed run leaves whole steps. Each record ends with a digest of its bytes and their type, which is checked when it is read. The
header says how many steps lie between two records, and which one is the last, so that a file that is lost is noticed.

float16 by default: its steps are at most 1/2048 of a number, those of bfloat16, which numpy lacks, 1/256. A
choice flips only where two logits come within such a step of each other; equal ones go to the lower expert.
Router logits stay far inside its range of 65504, to which larger ones are clipped. float32 is exact.

Axes as in `moe_jax.types`, and I: recorded steps.
"""

import hashlib
import json
import os
import pathlib
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Self

import numpy as np

from moe_jax import disk
from moe_jax.errors import InputError

FOLDER = "router_logits"  # in the folder of a run
FLUSH_BYTES = 1 << 24  # at most about so many wait to be written
CHUNK_BYTES = 1 << 26
FORMAT = 3
_FIELDS = ("step", "logits_RBLE", "mask_BL", "domain_B", "key_B2")  # of a record, in the order of `Steps`
_DIGEST = np.dtype("uint32")  # of the last field of a record


class Steps(NamedTuple):
  """Consecutive recorded steps. Sequences are in the order of the batch, however the step cut it."""

  step_I: np.ndarray  # int64, optimizer steps, from 1
  logits_IRBLE: np.ndarray  # float16 or float32, what the routers of the R layers were given
  mask_IBL: np.ndarray  # bool, False: padding
  domain_IB: np.ndarray  # int32
  key_IB2: np.ndarray  # uint32, the random key of each sequence, for routers that draw


class TraceWriter:
  """Appends steps to a trace. A context manager: leaving it writes what is left.

  Args:
    folder: of the trace; made if absent.
    header: JSON values that say what was recorded. `every`: steps from one record to the next; by default 1.
    resume_step: the last step that the restored checkpoint holds. Later steps are removed, for the run will
      make them again. Damaged files are moved aside, and one line says which steps are missing.

  Raises:
    InputError: the folder holds a trace of another version.
  """

  def __init__(self, folder: str | os.PathLike[str], header: Mapping[str, Any], *, resume_step: int = 0):
    self.folder = pathlib.Path(folder)
    self.folder.mkdir(parents=True, exist_ok=True)
    old = disk.read_object(self.folder / "header.json") or {}
    if old.get("format", FORMAT) != FORMAT:
      raise InputError(
        f"{self.folder}: holds router logits of format {old['format']}, this writes {FORMAT}; remove this folder, or "
        "choose another one for the run"
      )
    self._header = {"format": FORMAT, "every": 1, **header}
    every = self._header["every"]
    self._last = resume_step // every * every  # the step that was recorded last
    self._write_header()  # not after the removal: a kill leaves no gap
    moved = _keep_whole(self.folder, resume_step, every)
    kept = [_open(path, every) for path in _files(self.folder)]
    missing = _missing(_steps_of(kept), every, self._last)
    if moved or missing:
      disk.note(f"{self.folder}: {'; '.join([*moved, missing or 'no step is lost'])}; the run goes on")
    self._dtype = kept[0].dtype if kept else None  # of a record; None: not known yet
    self._arriving: tuple[Any, ...] | None = None
    self._records: list[np.ndarray] = []

  def add(self, step: int, arrays: Mapping[str, Any]) -> None:
    """One step: `logits_RBLE`, `mask_BL`, `domain_B`, `key_B`. It is read when the next one comes, so that
    arrays of an accelerator have time to arrive, and written together with others.

    Raises:
      InputError: the folder holds steps of another shape or number type.
      ValueError: the step is not the next one to record.
    """
    if step != self._last + self._header["every"]:
      raise ValueError(f"step {step} cannot follow {self._last}: every {self._header['every']} are recorded")
    self._last = step
    self._read_arriving()
    if sum(record.nbytes for record in self._records) >= FLUSH_BYTES:
      self.flush()
    self._arriving = step, *(arrays[name] for name in ("logits_RBLE", "mask_BL", "domain_B", "key_B"))

  def flush(self) -> None:
    """Writes every step so far."""
    self._read_arriving()
    if self._records:
      records = np.stack(self._records)
      _save(self.folder, records)
      self._write_header()
      self._records = []

  def _write_header(self) -> None:
    header = self._header | {"last": self._last}
    disk.write_json(self.folder / "header.json", header | {"digest": _digest_of_json(header)})

  def _read_arriving(self) -> None:
    if self._arriving is None:
      return
    values, self._arriving = tuple(map(np.asarray, self._arriving)), None
    fields = [(name, x.dtype, x.shape) for name, x in zip(_FIELDS, values, strict=True)]
    dtype = np.dtype([*fields, ("digest", _DIGEST)])
    self._dtype = self._dtype or dtype
    if dtype != self._dtype:
      was, now = (f"{d['logits_RBLE'].base} {d['logits_RBLE'].shape}" for d in (self._dtype, dtype))
      raise InputError(
        f"{self.folder}: holds steps of {was}, and the run now makes {now}; remove the folder of the trace, or of "
        "the run"
      )
    record = np.array((*values, 0), dtype)
    record["digest"] = _digests(record[None])[0]
    self._records.append(record)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *unused_exception: Any) -> None:
    self.flush()


class Trace:
  """A recorded trace. Nothing but the steps' numbers is loaded before it is asked for.

  If recorded steps are missing, because a file was damaged or removed, one line says which; so does `missing`.

  Args:
    path: the folder of the trace, or of the run that has one.

  Raises:
    InputError: there is no trace, or one without a step, or with a damaged file.
  """

  def __init__(self, path: str | os.PathLike[str]):
    self.folder = pathlib.Path(path)
    if (self.folder / FOLDER).is_dir():
      self.folder = self.folder / FOLDER
    self.header = _read_header(self.folder)
    self._paths = _files(self.folder)
    self._files = [_open(path, self.header["every"]) for path in self._paths]
    if not self._files:
      raise InputError(f"{path}: the recorded router logits hold no whole step")
    self.step_I = _steps_of(self._files)
    if np.any(np.diff(self.step_I) <= 0):
      raise InputError(f"{self.folder}: a step is there twice; remove the file that was added")
    self.missing = _missing(self.step_I, self.header["every"], self.header["last"])
    if self.missing:
      disk.note(f"{self.folder}: {self.missing}")

  def __len__(self) -> int:
    return len(self.step_I)

  @property
  def shape(self) -> tuple[int, int, int, int]:
    """(R, B, L, E) of one step; E is the number of experts that the router scores."""
    return self._files[0].dtype["logits_RBLE"].shape

  @property
  def bytes_per_step(self) -> int:
    return self._files[0].dtype.itemsize

  def read(self, start: int, stop: int) -> Steps:
    """Recorded steps `start` to `stop`, copied into memory.

    Raises:
      InputError: one of them does not have its digest.
    """
    first, parts = 0, []
    for path, records in zip(self._paths, self._files, strict=True):
      parts.append(records[max(start - first, 0) : max(stop - first, 0)])
      first += len(records)
      _check_digests(path, parts[-1])
    return Steps(*(np.concatenate([part[name] for part in parts]) for name in _FIELDS))

  def chunks(self, size: int = 0) -> Iterator[Steps]:
    """All steps in order, `size` at a time; 0: about 64 MiB."""
    size = size or max(1, CHUNK_BYTES // self.bytes_per_step)
    for start in range(0, len(self), size):
      yield self.read(start, min(start + size, len(self)))


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
  """In the order of the steps."""
  return sorted(folder.glob("steps_*.npy"))


def _steps_of(files: list[np.ndarray]) -> np.ndarray:
  return np.concatenate([np.zeros(0, np.int64), *(records["step"] for records in files)])


def _missing(step_I: np.ndarray, every: int, last: int) -> str:
  """Says which steps are not there up to `last`, and up to the last one there is; empty: none."""
  expected = np.arange(every, max(last, *step_I[-1:], 0) + 1, every)
  lost = expected[~np.isin(expected, step_I)]
  if not len(lost):
    return ""
  runs = np.split(lost, np.flatnonzero(np.diff(lost) != every) + 1)
  words = [f"{run[0]}" if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
  shown = ", ".join(words[:5]) + (" and others" if len(words) > 5 else "")
  return f"{len(lost)} of {len(expected)} recorded steps are missing: {shown}"


def _read_header(folder: pathlib.Path) -> dict[str, Any]:
  path = folder / "header.json"
  header = disk.read_object(path)
  if header is None:
    raise InputError(f"{folder}: holds no router logits; train with --record_router_logits=1")
  if header.get("format") != FORMAT:
    raise InputError(f"{folder}: router logits of format {header.get('format')}, this reads {FORMAT}")
  if header.pop("digest", "") != _digest_of_json(header):
    raise InputError(
      f"{path}: is damaged: not what was written; bring it back, or record the run in a new folder"
    )
  return header


def _digest_of_json(value: Any) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _open(path: pathlib.Path, every: int) -> np.ndarray:
  """The records of a file, mapped into memory. Their digests are not checked yet.

  Raises:
    InputError: it is not a file of records, or their steps do not follow from its name.
  """
  try:
    records = np.load(path, mmap_mode="r", allow_pickle=False)
  except Exception:  # whatever damaged bytes lead to
    records = np.empty(0)
  fields = (*_FIELDS, "digest")
  whole = records.ndim == 1 and records.dtype.names == fields and records.dtype["digest"] == _DIGEST
  if (
    not whole or np.any(records["step"] != _first(path) + every * np.arange(len(records))) or not len(records)
  ):
    raise InputError(
      f"{path}: is damaged; move it away to read the others, or record the run in a new folder"
    )
  return records


def _first(path: pathlib.Path) -> int:
  """The step in the name of a file."""
  number = path.stem.removeprefix("steps_")
  return int(number) if number.isdecimal() else -1


def _digests(records: np.ndarray) -> np.ndarray:
  """A digest of the bytes of each record but its last field, and of their type."""
  start = zlib.crc32(repr(records.dtype.descr).encode())
  rows = np.ascontiguousarray(records).view(np.uint8).reshape(len(records), -1)
  return np.array([zlib.crc32(row[: -_DIGEST.itemsize], start) for row in rows], _DIGEST)


def _check_digests(path: pathlib.Path, records: np.ndarray) -> None:
  """Raises `InputError` if a record is not what was written."""
  if len(records) and np.any(wrong := records["digest"] != _digests(records)):
    raise InputError(
      f"{path}: is damaged: {wrong.sum()} of {len(records)} steps do not have their digest; move it away to read the "
      "others, or record the run in a new folder"
    )


def _save(folder: pathlib.Path, records: np.ndarray) -> None:
  with disk.whole_file(folder / f"steps_{records['step'][0]:012d}.npy") as file:
    np.save(file, records, allow_pickle=False)


def _keep_whole(folder: pathlib.Path, step: int, every: int) -> list[str]:
  """Removes what comes after `step`, and moves damaged files aside; returns a word about each of these.

  Backwards: a kill in between leaves no gap.
  """
  moved = []
  for path in reversed(_files(folder)):
    if _first(path) > step:
      path.unlink()
      continue
    try:
      records = _open(path, every)
      for i in range(len(records)):  # one in memory at a time
        _check_digests(path, records[i : i + 1])
    except InputError:
      moved.append(f"{path.name} is damaged, moved to {disk.move_aside(path, folder)}")
      continue
    if records["step"][-1] > step:
      _save(folder, records[records["step"] <= step])
  return moved[::-1]
