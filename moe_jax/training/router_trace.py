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

import contextlib
import mmap
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple, Self

import numpy as np

from moe_jax import disk
from moe_jax.errors import InputError
from moe_jax.training import trace_files as files

FOLDER = "router_logits"  # in the folder of a run
FLUSH_BYTES = 1 << 24  # at most about so many wait to be written
CHUNK_BYTES = 1 << 26


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
    header: JSON values that say what was recorded. `every`: steps from one record to the next; by default 1. `layers`: the
      number of each of the R layers in the model; by default 0 to R - 1.
    resume_step: the last step that the restored checkpoint holds. Later steps are removed, for the run will
      make them again. Damaged files are moved aside, and one line says which steps are missing.

  Raises:
    InputError: the folder holds a trace of another version.
  """

  def __init__(self, folder: str | os.PathLike[str], header: Mapping[str, Any], *, resume_step: int = 0):
    self.folder = pathlib.Path(folder)
    self.folder.mkdir(parents=True, exist_ok=True)
    old = disk.read_object(self.folder / files.HEADER) or {}
    if old.get("format", files.FORMAT) != files.FORMAT:
      raise InputError(
        f"{self.folder}: holds router logits of format {old['format']}, this writes {files.FORMAT}; remove this folder, or "
        "choose another one for the run"
      )
    self._header = files.full_header(header)
    every = self._header["every"]
    self._last = resume_step // every * every  # the step that was recorded last
    files.write_header(self.folder, self._header, self._last)  # not after the removal: a kill leaves no gap
    moved = files.keep_whole(self.folder, resume_step, every)
    kept = [files.open_file(path, every) for path in files.paths_in(self.folder)]
    missing = files.missing(files.steps_of(kept), every, self._last)
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
      files.save(self.folder, records)
      files.write_header(self.folder, self._header, int(records["step"][-1]))
      self._records = []

  def _read_arriving(self) -> None:
    if self._arriving is None:
      return
    values, self._arriving = tuple(map(np.asarray, self._arriving)), None
    fields = [(name, x.dtype, x.shape) for name, x in zip(files.FIELDS, values, strict=True)]
    dtype = np.dtype([*fields, ("digest", files.DIGEST)])
    self._dtype = self._dtype or dtype
    if dtype != self._dtype:
      was, now = (f"{d['logits_RBLE'].base} {d['logits_RBLE'].shape}" for d in (self._dtype, dtype))
      raise InputError(
        f"{self.folder}: holds steps of {was}, and the run now makes {now}; remove the folder of the trace, or of "
        "the run"
      )
    record = np.array((*values, 0), dtype)
    record["digest"] = files.digests(record[None])[0]
    self._records.append(record)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *unused_exception: Any) -> None:
    self.flush()


@contextlib.contextmanager
def write_by_layer(
  folder: str | os.PathLike[str],
  header: Mapping[str, Any],
  steps: Sequence[Mapping[str, Any]],
  num_layers: int,
) -> Iterator[Callable[[int, int, np.ndarray], None]]:
  """Writes a trace whose logits come layer by layer, in any order. None of them stays in memory.

  Args:
    folder: of the trace; made if absent. It must hold none.
    header: JSON values that say what is recorded.
    steps: `mask_BL`, `domain_B` and `key_B` of each.
    num_layers: R.

  Yields:
    A function of the number of a step, from 0, of that of a layer, and of logits_BLE, to call once for each layer of
    each step. The logits are all of one shape and type.

  Raises:
    ValueError: on leaving, if some are missing. There is no trace then.
  """
  files.write_header(pathlib.Path(folder), files.full_header(header), len(steps))
  with disk.whole_file(files.path_of(pathlib.Path(folder), 1)) as file:
    begin, record, count = 0, np.dtype([]), 0

    def add(step: int, layer: int, logits_BLE: np.ndarray) -> None:
      nonlocal begin, record, count
      if not count:
        begin, record = _write_without_logits(file, steps, (num_layers, *logits_BLE.shape), logits_BLE.dtype)
      place = begin + step * record.itemsize + record.fields["logits_RBLE"][1]
      file.seek(place + layer * logits_BLE.nbytes)
      file.write(logits_BLE.tobytes())
      count += 1

    yield add
    if count != len(steps) * num_layers:
      raise ValueError(f"logits of {count} layers, and {len(steps)} steps have {num_layers} each")
    file.flush()
    with mmap.mmap(file.fileno(), 0) as whole:
      for i in range(len(steps)):
        place = begin + i * record.itemsize
        (digest,) = files.digests(np.frombuffer(whole, record, 1, place))
        end = place + record.itemsize
        whole[end - files.DIGEST.itemsize : end] = digest.tobytes()


def _write_without_logits(
  file: IO[bytes], steps: Sequence[Mapping[str, Any]], shape: tuple[int, ...], dtype: np.dtype
) -> tuple[int, np.dtype]:
  """Writes records with room for logits of this shape, and for digests. Returns where they begin, and their type."""
  batch, length = shape[1:3]
  fields = [("step", "<i8", ()), ("logits_RBLE", dtype, shape), ("mask_BL", "?", (batch, length))]
  fields += [("domain_B", "<i4", (batch,)), ("key_B2", "<u4", (batch, 2)), ("digest", files.DIGEST)]
  record = np.dtype(fields)
  header = {"descr": np.lib.format.dtype_to_descr(record), "fortran_order": False, "shape": (len(steps),)}
  np.lib.format.write_array_header_2_0(file, header)
  begin = file.tell()
  for i, values in enumerate(steps):
    values = {
      "step": i + 1,
      "key_B2": values["key_B"],
      **{name: values[name] for name in ("mask_BL", "domain_B")},
    }
    for name, value in values.items():
      of_field, offset = record.fields[name][:2]
      file.seek(begin + i * record.itemsize + offset)
      file.write(np.broadcast_to(value, of_field.shape).astype(of_field.base).tobytes())
  file.seek(begin + len(steps) * record.itemsize - files.DIGEST.itemsize)
  file.write(bytes(files.DIGEST.itemsize))  # the length of the file
  return begin, record


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
    self.header = files.read_header(self.folder)
    self._paths = files.paths_in(self.folder)
    self._files = [files.open_file(path, self.header["every"]) for path in self._paths]
    if not self._files:
      raise InputError(f"{path}: the recorded router logits hold no whole step")
    self.step_I = files.steps_of(self._files)
    if np.any(np.diff(self.step_I) <= 0):
      raise InputError(f"{self.folder}: a step is there twice; remove the file that was added")
    self.missing = files.missing(self.step_I, self.header["every"], self.header["last"])
    if self.missing:
      disk.note(f"{self.folder}: {self.missing}")

  def __len__(self) -> int:
    return len(self.step_I)

  @property
  def shape(self) -> tuple[int, int, int, int]:
    """(R, B, L, E) of one step; E is the number of experts that the router scores."""
    return self._files[0].dtype["logits_RBLE"].shape

  @property
  def layers(self) -> tuple[int, ...]:
    """The number of each of the R layers in the model, on which its random keys depend.

    Raises:
      InputError: the header has another number of them.
    """
    layers = tuple(self.header.get("layers", range(self.shape[0])))
    if len(layers) != self.shape[0]:
      raise InputError(
        f"{self.folder}: its header names {len(layers)} layers, and the steps have {self.shape[0]}; record the run again"
      )
    return layers

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
      files.check_digests(path, parts[-1])
    return Steps(*(np.concatenate([part[name] for part in parts]) for name in files.FIELDS))

  def chunks(self, size: int = 0) -> Iterator[Steps]:
    """All steps in order, `size` at a time; 0: about 64 MiB."""
    size = size or max(1, CHUNK_BYTES // self.bytes_per_step)
    for start in range(0, len(self), size):
      yield self.read(start, min(start + size, len(self)))
