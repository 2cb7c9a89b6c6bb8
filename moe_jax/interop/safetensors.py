"""Reads and writes safetensors files: 8 bytes of header length, a JSON header, and the bytes of the tensors.

The library `safetensors` has no NumPy form of bfloat16 and FP8. Here tensors are views of the mapped file, so slicing
one reads only the bytes of the slice.
"""

import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from moe_jax import disk
from moe_jax.errors import InputError

DTYPES: Mapping[str, np.dtype] = {
  name: np.dtype(dtype)
  for name, dtype in {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
  }.items()
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LARGEST_HEADER = 100_000_000  # the library's limit


class Pending(NamedTuple):
  """A tensor to write. `make` returns its values, and is called when they are written."""

  shape: tuple[int, ...]
  dtype: np.dtype
  make: Callable[[], np.ndarray]

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


class _Entry(NamedTuple):
  """What a header says of one tensor. Bytes `first` to `end` of the content are its values."""

  dtype: str
  shape: tuple[int, ...]
  first: int
  end: int


def open_file(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns the tensors of a file by name, as views of the mapped file. Nothing is read but the header.

  Raises:
    InputError: if the file is missing, cannot be read, is torn, has a header that does not describe it, or holds a
      type that is not in `DTYPES`.
  """
  try:
    size = path.stat().st_size
    with path.open("rb") as file:
      length = int.from_bytes(file.read(8), "little")
      if not 2 <= length <= min(size - 8, _LARGEST_HEADER):
        raise ValueError(f"a header of {length} bytes in a file of {size}")
      entries = _entries(disk.parse_json(file.read(length)))
    end = max((entry.end for entry in entries.values()), default=0)
    if size != 8 + length + end:
      raise ValueError(f"has {size} bytes, and its header says {8 + length + end}")
  except FileNotFoundError:
    raise InputError(f"{path}: this file of the checkpoint is missing") from None
  except OSError as error:
    raise InputError(f"{path}: cannot be read ({error.strerror})") from None
  except ValueError as error:
    raise InputError(f"{path}: is not a whole safetensors file ({error}); download it again") from None
  content = np.memmap(path, np.uint8, "r", offset=8 + length, shape=(end,)) if end else np.zeros(0, np.uint8)
  return {name: _view(path, name, entry, content) for name, entry in entries.items()}


def _entries(header: Any) -> dict[str, _Entry]:
  """The tensors of a header by name.

  Raises:
    ValueError: if a field is not what the format has, or two tensors share bytes, or bytes are no tensor's.
  """
  if not isinstance(header, dict):
    raise ValueError("its header is no JSON object")
  entries = {name: _entry(name, fields) for name, fields in header.items() if name != "__metadata__"}
  end = 0
  for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):  # by their places
    if entry.first != end:
      raise ValueError(f"{short(name)} begins at byte {entry.first}, and what is before it ends at {end}")
    end = entry.end
  return entries


def _entry(name: str, fields: Any) -> _Entry:
  found = fields if isinstance(fields, dict) else {}
  dtype, shape, offsets = (found.get(key) for key in ("dtype", "shape", "data_offsets"))
  is_count = lambda x: type(x) is int and x >= 0
  are_counts = lambda x: isinstance(x, list) and all(map(is_count, x))
  if not isinstance(dtype, str) or not are_counts(shape) or not are_counts(offsets) or len(offsets) != 2:
    raise ValueError(f"its header says {short(fields)} of {short(name)}")
  if offsets[0] > offsets[1]:
    raise ValueError(f"{short(name)} ends before it begins")
  return _Entry(dtype, tuple(shape), *offsets)


def _view(path: pathlib.Path, name: str, entry: _Entry, content: np.ndarray) -> np.ndarray:
  if entry.dtype not in DTYPES:
    known = ", ".join(DTYPES)
    raise InputError(
      f"{path}: {short(name)} has type {short(entry.dtype)}, which is not read (known: {known})"
    )
  dtype, size = DTYPES[entry.dtype], entry.end - entry.first
  if size != math.prod(entry.shape) * dtype.itemsize:
    of_shape = f"{entry.dtype}{short(list(entry.shape))}"
    raise InputError(f"{path}: {short(name)} has {size} bytes, which is no {of_shape}")
  try:
    return content[entry.first : entry.end].view(dtype).reshape(entry.shape)
  except (ValueError, OverflowError) as error:  # of no bytes, with too many axes or too long ones
    raise InputError(f"{path}: {short(name)} has a shape that NumPy has not ({error})") from None


def short(value: Any) -> str:
  """Returns the beginning of a name or value that a file has, printable, for an error."""
  return (repr(value)[1:-1] if isinstance(value, str) else repr(value))[:80]


def write_file(path: pathlib.Path, tensors: Mapping[str, Pending]) -> None:
  """Writes a file with these tensors, one at a time. A file that exists is complete."""
  header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
  offset = 0
  for name, tensor in tensors.items():
    dtype, end = _NAMES[tensor.dtype], offset + tensor.nbytes
    header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
    offset = end
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)  # so that every tensor of 8 bytes' type is aligned
  with disk.whole_file(path) as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
      values = np.asarray(tensor.make(), tensor.dtype, order="C")
      assert values.shape == tensor.shape
      file.write(values.reshape(-1).view(np.uint8).data)
