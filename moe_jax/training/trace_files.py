"""The files of a trace of router logits (`moe_jax.training.router_trace`): their names, digests, and what is wrong with them."""

import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from moe_jax import disk
from moe_jax.errors import InputError, is_of_the_machine

FORMAT = 4
HEADER = "header.json"
FIELDS = ("step", "logits_RBLE", "mask_BL", "domain_B", "key_B2")  # of a record, in the order of `Steps`
DIGEST = np.dtype("uint32")  # of the last field of a record


def path_of(folder: pathlib.Path, first_step: int) -> pathlib.Path:
  return folder / f"steps_{first_step:012d}.npy"


def paths_in(folder: pathlib.Path) -> list[pathlib.Path]:
  """In the order of the steps."""
  return sorted(folder.glob("steps_*.npy"))


def steps_of(files: list[np.ndarray]) -> np.ndarray:
  return np.concatenate([np.zeros(0, np.int64), *(records["step"] for records in files)])


def missing(step_I: np.ndarray, every: int, last: int) -> str:
  """Says which steps are not there up to `last`, and up to the last one there is; empty: none."""
  expected = np.arange(every, max(last, *step_I[-1:], 0) + 1, every)
  lost = expected[~np.isin(expected, step_I)]
  if not len(lost):
    return ""
  runs = np.split(lost, np.flatnonzero(np.diff(lost) != every) + 1)
  words = [f"{run[0]}" if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
  shown = ", ".join(words[:5]) + (" and others" if len(words) > 5 else "")
  return f"{len(lost)} of {len(expected)} recorded steps are missing: {shown}"


def full_header(header: Mapping[str, Any]) -> dict[str, Any]:
  return {"format": FORMAT, "every": 1, **header}


def write_header(folder: pathlib.Path, header: Mapping[str, Any], last: int) -> None:
  """Writes the header of a trace whose last recorded step is `last`, with its digest. Makes the folder."""
  disk.write_json(folder / HEADER, disk.with_digest({**header, "last": last}))


def read_header(folder: pathlib.Path) -> dict[str, Any]:
  path = folder / HEADER
  header = disk.read_object(path)
  if header is None:
    raise InputError(f"{folder}: holds no router logits; train with --record_router_logits=1")
  if header.get("format") != FORMAT:
    raise InputError(f"{folder}: router logits of format {header.get('format')}, this reads {FORMAT}")
  if disk.DIGEST not in header or not disk.has_its_digest(header):
    raise InputError(
      f"{path}: is damaged: not what was written; bring it back, or record the run in a new folder"
    )
  return {key: value for key, value in header.items() if key != disk.DIGEST}


def open_file(path: pathlib.Path, every: int) -> np.ndarray:
  """The records of a file, mapped into memory. Their digests are not checked yet.

  Raises:
    InputError: it is not a file of records, or their steps do not follow from its name.
    OSError: with the name of the file, if the machine cannot read it now. It may be whole.
  """
  try:
    with disk.named(path):
      records = np.load(path, mmap_mode="r", allow_pickle=False)
  except Exception as error:  # whatever damaged bytes lead to
    if is_of_the_machine(error):
      raise
    records = np.empty(0)
  fields = (*FIELDS, "digest")
  whole = records.ndim == 1 and records.dtype.names == fields
  whole = whole and (records.dtype["step"], records.dtype["digest"]) == (np.int64, DIGEST)
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


def digests(records: np.ndarray) -> np.ndarray:
  """A digest of the bytes of each record but its last field, and of their type."""
  start = zlib.crc32(repr(records.dtype.descr).encode())
  rows = np.ascontiguousarray(records).view(np.uint8).reshape(len(records), -1)
  return np.array([zlib.crc32(row[: -DIGEST.itemsize], start) for row in rows], DIGEST)


def check_digests(path: pathlib.Path, records: np.ndarray) -> None:
  """Raises `InputError` if a record is not what was written."""
  if len(records) and np.any(wrong := records["digest"] != digests(records)):
    raise InputError(
      f"{path}: is damaged: {wrong.sum()} of {len(records)} steps do not have their digest; move it away to read the "
      "others, or record the run in a new folder"
    )


def save(folder: pathlib.Path, records: np.ndarray) -> None:
  with disk.whole_file(path_of(folder, records["step"][0])) as file:
    np.save(file, records, allow_pickle=False)


def keep_whole(folder: pathlib.Path, step: int, every: int) -> list[str]:
  """Removes what comes after `step`, and moves damaged files aside; returns a word about each of these.

  Backwards: a kill in between leaves no gap.

  Raises:
    InputError: if a damaged file cannot be moved.
  """
  moved = []
  for path in reversed(paths_in(folder)):
    if _first(path) > step:
      path.unlink()
      continue
    try:
      records = open_file(path, every)
      for i in range(len(records)):  # one in memory at a time
        check_digests(path, records[i : i + 1])
    except InputError:
      moved.append(f"{path.name} is damaged, moved to {disk.move_aside(path, folder)}")
      continue
    if records["step"][-1] > step:
      save(folder, records[records["step"] <= step])
  return moved[::-1]
