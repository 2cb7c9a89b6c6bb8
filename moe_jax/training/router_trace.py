"""Router logits of a training run on disk: recorded once, replayed under other balancers (`moe_jax.analysis.replay`).

A trace is a folder of plain .npy files, one entry of their first axis per recorded optimizer step, and
header.json. `numpy.load(..., mmap_mode="r")` reads them anywhere. A .npy file grows at its end and its header
says how many entries are whole, so a killed run leaves every step that was written before.

float16 by default: its steps are at most 1/2048 of a number, those of bfloat16, which numpy lacks, 1/256. A
choice flips only where two logits come within such a step of each other; equal ones go to the lower expert.
Router logits stay far inside its range of 65504, to which larger ones are clipped. float32 is exact.

Axes as in `moe_jax.types`, and I: recorded steps.
"""

import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Self

import numpy as np

from moe_jax.errors import InputError

FOLDER = "router_logits"  # in the folder of a run
CHUNK_BYTES = 1 << 26
FORMAT = 1


class Steps(NamedTuple):
  """Consecutive recorded steps. Sequences are in the order of the batch, however the step cut it."""

  step_I: np.ndarray  # int64, optimizer steps, from 1
  logits_IRBLE: np.ndarray  # float16 or float32, what the routers of the R layers were given
  mask_IBL: np.ndarray  # bool, False: padding
  domain_IB: np.ndarray  # int32
  key_IBX: np.ndarray  # uint32 [I, B, 2], the random key of each sequence, for routers that draw


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
    kept = 0
    if (self.folder / _file("step_I")).exists():
      kept = int(np.searchsorted(_whole_steps(self.folder).step_I, resume_step, side="right"))
    self._arrays = {name: _GrowingArray(self.folder / _file(name), kept) for name in Steps._fields}
    _write_json(self.folder / "header.json", {"format": FORMAT, **header})
    self._waiting: tuple[int, Mapping[str, Any]] | None = None

  def add(self, step: int, arrays: Mapping[str, Any]) -> None:
    """One step: `logits_RBLE`, `mask_BL`, `domain_B`, `key_B`. It is written when the next one comes, so that
    arrays of an accelerator have time to arrive.

    Raises:
      InputError: the folder holds steps of another shape or number type.
    """
    self.flush()
    self._waiting = step, arrays

  def flush(self) -> None:
    """Writes the step that is waiting."""
    if self._waiting is None:
      return
    step, arrays = self._waiting
    self._waiting = None
    values = (np.int64(step), *(arrays[n] for n in ("logits_RBLE", "mask_BL", "domain_B", "key_B")))
    for array, value in zip(self._arrays.values(), values, strict=True):
      array.append(np.asarray(value))

  def close(self) -> None:
    self.flush()
    for array in self._arrays.values():
      array.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *unused_exception: Any) -> None:
    self.close()


class Trace:
  """A recorded trace. Nothing is loaded before it is asked for.

  Args:
    path: the folder of the trace, or of the run that has one.

  Raises:
    InputError: there is no trace, or one without a whole step.
  """

  def __init__(self, path: str | os.PathLike[str]):
    self.folder = pathlib.Path(path)
    if (self.folder / FOLDER).is_dir():
      self.folder = self.folder / FOLDER
    try:
      self.header = json.loads((self.folder / "header.json").read_text())
    except (OSError, ValueError):
      raise InputError(f"{path}: holds no router logits; train with --record_router_logits=1") from None
    if self.header.get("format") != FORMAT:
      raise InputError(f"{path}: router logits of format {self.header.get('format')}, this reads {FORMAT}")
    self._steps = _whole_steps(self.folder)
    if not len(self):
      raise InputError(f"{path}: the recorded router logits hold no whole step")

  def __len__(self) -> int:
    return len(self._steps.step_I)

  @property
  def step_I(self) -> np.ndarray:
    return np.array(self._steps.step_I)

  @property
  def shape(self) -> tuple[int, int, int, int]:
    """(R, B, L, E) of one step; E is the number of experts that the router scores."""
    return self._steps.logits_IRBLE.shape[1:]

  @property
  def bytes_per_step(self) -> int:
    return sum(array[0].nbytes for array in self._steps)

  def read(self, start: int, stop: int) -> Steps:
    """Recorded steps `start` to `stop`, copied into memory."""
    return Steps(*(np.array(array[start:stop]) for array in self._steps))

  def chunks(self, size: int = 0) -> Iterator[Steps]:
    """All steps in order, `size` at a time; 0: about 64 MiB."""
    size = size or max(1, CHUNK_BYTES // self.bytes_per_step)
    for start in range(0, len(self), size):
      yield self.read(start, min(start + size, len(self)))


class _GrowingArray:
  """A .npy file that grows along its first axis; `kept` entries of an earlier one stay."""

  def __init__(self, path: pathlib.Path, kept: int):
    self._path, self._count = path, kept
    self._entry: tuple[tuple[int, ...], np.dtype] | None = None  # shape and type of one, once known
    self._file = path.open("r+b" if kept else "w+b")
    if kept:
      shape, dtype, offset = _read_header(path)
      self._entry = shape[1:], dtype
      self._write_header()
      self._file.truncate(offset + kept * _entry_bytes(shape, dtype))

  def append(self, value: np.ndarray) -> None:
    if self._entry is None:
      self._entry = value.shape, value.dtype
      self._write_header()
    if (value.shape, value.dtype) != self._entry:
      shape, dtype = self._entry
      raise InputError(
        f"{self._path}: holds steps of {dtype} {shape}, and the run now makes {value.dtype} {value.shape}; "
        "remove the folder of the trace, or of the run"
      )
    self._file.seek(0, os.SEEK_END)
    self._file.write(np.ascontiguousarray(value).tobytes())
    self._file.flush()
    # Last, so that the header never counts an entry that is not whole.
    self._count += 1
    self._write_header()

  def close(self) -> None:
    self._file.close()

  def _write_header(self) -> None:
    """Of the same length for any count: numpy leaves room for the first axis to grow."""
    shape, dtype = self._entry
    header = {
      "descr": np.lib.format.dtype_to_descr(dtype),
      "fortran_order": False,
      "shape": (self._count, *shape),
    }
    self._file.seek(0)
    np.lib.format.write_array_header_1_0(self._file, header)
    self._file.flush()


def _read_header(path: pathlib.Path) -> tuple[tuple[int, ...], np.dtype, int]:
  """(shape, type, bytes before the data)."""
  with path.open("rb") as file:
    np.lib.format.read_magic(file)
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    return shape, dtype, file.tell()


def _entry_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
  return int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize


def _whole_steps(folder: pathlib.Path) -> Steps:
  """The files mapped into memory, cut to the steps that are whole in all of them."""
  arrays = [_mapped(folder / _file(name)) for name in Steps._fields]
  count = min(len(array) for array in arrays)
  return Steps(*(array[:count] for array in arrays))


def _mapped(path: pathlib.Path) -> np.ndarray:
  try:
    shape, dtype, offset = _read_header(path)
    # Of a file that was cut short, the entries that are there.
    count = min(shape[0], (path.stat().st_size - offset) // _entry_bytes(shape, dtype))
  except (OSError, ValueError):
    return np.empty(0)
  if count < 1:
    return np.empty((0, *shape[1:]), dtype)
  return np.memmap(path, dtype, "r", offset, (count, *shape[1:]))


def _file(name: str) -> str:
  """`logits_IRBLE` -> `logits.npy`."""
  return f"{name.partition('_')[0]}.npy"


def _write_json(path: pathlib.Path, value: Any) -> None:
  path.write_text(json.dumps(value, indent=1) + "\n")
