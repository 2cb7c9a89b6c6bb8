"""Router logits of a training run on disk: recorded once, replayed under other balancers (`moe_jax.analysis.replay`).

A trace is a folder of header.json and steps_<first step>.npy files. Each file is an array of records, one per
recorded step, which `numpy.load(..., mmap_mode="r")` reads anywhere. A file gets its name when it is whole, so a
killed run leaves whole steps.

float16 by default: its steps are at most 1/2048 of a number, those of bfloat16, which numpy lacks, 1/256. A
choice flips only where two logits come within such a step of each other; equal ones go to the lower expert.
Router logits stay far inside its range of 65504, to which larger ones are clipped. float32 is exact.

Axes as in `moe_jax.types`, and I: recorded steps.
"""

import contextlib
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple, Self

import numpy as np

from moe_jax import disk
from moe_jax.errors import InputError

FOLDER = "router_logits"  # in the folder of a run
FLUSH_BYTES = 1 << 24  # at most about so many wait to be written
CHUNK_BYTES = 1 << 26
FORMAT = 2
_FIELDS = ("step", "logits_RBLE", "mask_BL", "domain_B", "key_B2")  # of a record, in the order of `Steps`


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
    header: JSON values that say what was recorded.
    resume_step: the last step that the restored checkpoint holds. Later steps are removed, for the run will
      make them again.
  """

  def __init__(self, folder: str | os.PathLike[str], header: Mapping[str, Any], *, resume_step: int = 0):
    self.folder = pathlib.Path(folder)
    self.folder.mkdir(parents=True, exist_ok=True)
    _remove_after(self.folder, resume_step)
    disk.write_json(self.folder / "header.json", {"format": FORMAT, **header})
    kept = _files(self.folder)
    self._dtype = _open(kept[0]).dtype if kept else None  # of a record; None: not known yet
    self._arriving: tuple[Any, ...] | None = None
    self._records: list[np.ndarray] = []

  def add(self, step: int, arrays: Mapping[str, Any]) -> None:
    """One step: `logits_RBLE`, `mask_BL`, `domain_B`, `key_B`. It is read when the next one comes, so that
    arrays of an accelerator have time to arrive, and written together with others.

    Raises:
      InputError: the folder holds steps of another shape or number type.
    """
    self._read_arriving()
    if sum(record.nbytes for record in self._records) >= FLUSH_BYTES:
      self.flush()
    self._arriving = step, *(arrays[name] for name in ("logits_RBLE", "mask_BL", "domain_B", "key_B"))

  def flush(self) -> None:
    """Writes every step so far."""
    self._read_arriving()
    if self._records:
      _save(self.folder, np.stack(self._records))
      self._records = []

  def _read_arriving(self) -> None:
    if self._arriving is None:
      return
    values, self._arriving = tuple(map(np.asarray, self._arriving)), None
    dtype = np.dtype([(name, x.dtype, x.shape) for name, x in zip(_FIELDS, values, strict=True)])
    self._dtype = self._dtype or dtype
    if dtype != self._dtype:
      was, now = (f"{d['logits_RBLE'].base} {d['logits_RBLE'].shape}" for d in (self._dtype, dtype))
      raise InputError(
        f"{self.folder}: holds steps of {was}, and the run now makes {now}; remove the folder of the trace, or of "
        "the run"
      )
    self._records.append(np.array(values, dtype))

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
  disk.write_json(pathlib.Path(folder) / "header.json", {"format": FORMAT, **header})
  with disk.whole_file(_file(folder, 1)) as file:
    start = size = count = 0

    def add(step: int, layer: int, logits_BLE: np.ndarray) -> None:
      nonlocal start, size, count
      if not count:
        start, size = _write_without_logits(file, steps, (num_layers, *logits_BLE.shape), logits_BLE.dtype)
      file.seek(start + step * size + layer * logits_BLE.nbytes)
      file.write(logits_BLE.tobytes())
      count += 1

    yield add
    if count != len(steps) * num_layers:
      raise ValueError(f"logits of {count} layers, and {len(steps)} steps have {num_layers} each")


def _write_without_logits(
  file: IO[bytes], steps: Sequence[Mapping[str, Any]], shape: tuple[int, ...], dtype: np.dtype
) -> tuple[int, int]:
  """Writes records with room for logits of this shape. Returns where the first logits begin, and a record's bytes."""
  batch, length = shape[1:3]
  fields = [("step", "<i8", ()), ("logits_RBLE", dtype, shape), ("mask_BL", "?", (batch, length))]
  record = np.dtype([*fields, ("domain_B", "<i4", (batch,)), ("key_B2", "<u4", (batch, 2))])
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
  return begin + record.fields["logits_RBLE"][1], record.itemsize


class Trace:
  """A recorded trace. Nothing but the steps' numbers is loaded before it is asked for.

  Args:
    path: the folder of the trace, or of the run that has one.

  Raises:
    InputError: there is no trace, or one without a step, or with a damaged file.
  """

  def __init__(self, path: str | os.PathLike[str]):
    self.folder = pathlib.Path(path)
    if (self.folder / FOLDER).is_dir():
      self.folder = self.folder / FOLDER
    self.header = disk.read_object(self.folder / "header.json")
    if self.header is None:
      raise InputError(f"{path}: holds no router logits; train with --record_router_logits=1")
    if self.header.get("format") != FORMAT:
      raise InputError(f"{path}: router logits of format {self.header.get('format')}, this reads {FORMAT}")
    self._files = [_open(file) for file in _files(self.folder)]
    if not self._files:
      raise InputError(f"{path}: the recorded router logits hold no whole step")
    self.step_I = np.concatenate([records["step"] for records in self._files])

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
    """Recorded steps `start` to `stop`, copied into memory."""
    first, parts = 0, []
    for records in self._files:
      parts.append(records[max(start - first, 0) : max(stop - first, 0)])
      first += len(records)
    return Steps(*(np.concatenate([part[name] for part in parts]) for name in _FIELDS))

  def chunks(self, size: int = 0) -> Iterator[Steps]:
    """All steps in order, `size` at a time; 0: about 64 MiB."""
    size = size or max(1, CHUNK_BYTES // self.bytes_per_step)
    for start in range(0, len(self), size):
      yield self.read(start, min(start + size, len(self)))


def _file(folder: str | os.PathLike[str], first_step: int) -> pathlib.Path:
  return pathlib.Path(folder) / f"steps_{first_step:012d}.npy"


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
  """In the order of the steps."""
  return sorted(folder.glob("steps_*.npy"))


def _open(path: pathlib.Path) -> np.ndarray:
  """The records of a file, mapped into memory."""
  try:
    records = np.load(path, mmap_mode="r", allow_pickle=False)
  except Exception:  # whatever damaged bytes lead to
    records = np.empty(0)
  if records.ndim != 1 or set(records.dtype.names or ()) != set(_FIELDS) or not len(records):
    raise InputError(f"{path}: is damaged; remove the folder of the trace, or of the run")
  return records


def _save(folder: pathlib.Path, records: np.ndarray) -> None:
  with disk.whole_file(_file(folder, records["step"][0])) as file:
    np.save(file, records, allow_pickle=False)


def _remove_after(folder: pathlib.Path, step: int) -> None:
  """Backwards: a kill in between leaves no gap."""
  for path in reversed(_files(folder)):
    if int(path.stem.removeprefix("steps_")) > step:
      path.unlink()
      continue
    records = _open(path)
    if records["step"][-1] > step:
      _save(folder, records[records["step"] <= step])
    break
