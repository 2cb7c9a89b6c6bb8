"""Reads and writes safetensors files: 8 bytes of header length, a JSON header, and the bytes of the tensors.

The library `safetensors` has no NumPy form of bfloat16 and FP8. Here tensors are views of the mapped file, so slicing
one reads only the bytes of the slice.
"""

import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

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


def open_file(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns the tensors of a file by name, as views of the mapped file. Nothing is read but the header.

  Raises:
    InputError: if the file is missing, torn, or holds a type that is not in `DTYPES`.
  """
  try:
    size = path.stat().st_size
    with path.open("rb") as file:
      length = int.from_bytes(file.read(8), "little")
      if not 2 <= length <= min(size - 8, _LARGEST_HEADER):
        raise ValueError(f"a header of {length} bytes in a file of {size}")
      header = disk.parse_json(file.read(length))
    header.pop("__metadata__", None)
    end = max((fields["data_offsets"][1] for fields in header.values()), default=0)
  except FileNotFoundError:
    raise InputError(f"{path}: this file of the checkpoint is missing") from None
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise InputError(f"{path}: is not a whole safetensors file ({error}); download it again") from None
  if size != 8 + length + end:
    wrong = f"has {size} bytes, and its header says {8 + length + end}"
    raise InputError(f"{path}: is not a whole safetensors file ({wrong}); download it again")
  content = np.memmap(path, np.uint8, "r", offset=8 + length, shape=(end,)) if end else np.zeros(0, np.uint8)
  return {name: _view(path, name, fields, content) for name, fields in header.items()}


def _view(path: pathlib.Path, name: str, fields: dict, content: np.ndarray) -> np.ndarray:
  if fields["dtype"] not in DTYPES:
    known = ", ".join(DTYPES)
    raise InputError(f"{path}: {name} has type {fields['dtype']}, which is not read (known: {known})")
  first, end = fields["data_offsets"]
  dtype, shape = DTYPES[fields["dtype"]], tuple(fields["shape"])
  if end - first != math.prod(shape) * dtype.itemsize:
    raise InputError(f"{path}: {name} has {end - first} bytes, which is no {fields['dtype']}{list(shape)}")
  return content[first:end].view(dtype).reshape(shape)


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
