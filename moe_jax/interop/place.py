"""From tensors of a checkpoint to arrays on devices, of which every process reads only its own parts."""

import functools
import itertools
import math
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.interop.names import Stored
from moe_jax.interop.quantised import Tensor

_STEP = 1 << 26  # bytes that are read at a time, so that what dequantising and casting needs stays small
_FEW = 10_000  # elements for which the way of copying does not matter
_ALIGNMENT = 64  # bytes; at such an address, a CPU device uses the memory of NumPy as it is
Index = tuple[slice, ...]


def load_parameter(
  stored: Stored, tensors: Mapping[str, Tensor], dtype: np.dtype, sharding: jax.sharding.Sharding
) -> jax.Array:
  """Returns the parameter as an array of `dtype` with this sharding.

  A process reads only what its devices hold, and each part once, however many devices hold it. On CPU, values are
  read into their final place. Other devices get them in steps of one layer, or of several small ones.
  """
  parts: dict[tuple, list[jax.Device]] = {}
  for device, index in sharding.addressable_devices_indices_map(stored.shape).items():
    bounds = tuple(part.indices(size)[:2] for part, size in zip(index, stored.shape, strict=True))
    parts.setdefault(bounds, []).append(device)
  arrays = []
  for bounds, (first, *others) in parts.items():
    part = _on_device(stored, tuple(slice(*bound) for bound in bounds), tensors, dtype, first)
    arrays += [part, *(jax.device_put(part, device) for device in others)]
  return jax.make_array_from_single_device_arrays(stored.shape, sharding, arrays)


def _on_device(
  stored: Stored, index: Index, tensors: Mapping[str, Tensor], dtype: np.dtype, device: jax.Device
) -> jax.Array:
  shape = tuple(part.stop - part.start for part in index)
  if in_place(device) or not shape:
    out = _aligned(shape, dtype)
    fill(out, stored, index, tensors)
    return jax.device_put(out, device, may_alias=True)
  array = jnp.zeros(shape, dtype, device=device)
  for step in _steps(index, dtype.itemsize):
    out = np.empty([part.stop - part.start for part in step], dtype)
    fill(out, stored, step, tensors)
    array = _put(array, jax.device_put(out, device), step[0].start - index[0].start)
  return array


def in_place(device: jax.Device) -> bool:
  """Returns whether arrays of this device can lie in memory of NumPy."""
  return device.platform == "cpu"


@functools.partial(jax.jit, donate_argnums=0)
def _put(array: jax.Array, part: jax.Array, start: int) -> jax.Array:
  return jax.lax.dynamic_update_slice_in_dim(array, part, start, axis=0)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  size = math.prod(shape) * dtype.itemsize
  memory = np.empty(size + _ALIGNMENT, np.uint8)
  first = -memory.ctypes.data % _ALIGNMENT
  return memory[first : first + size].view(dtype).reshape(shape)


def fill(out: np.ndarray, stored: Stored, index: Index, tensors: Mapping[str, Tensor]) -> None:
  """Reads the part `index` of a parameter into `out`, piece by piece."""
  for piece in stored.pieces:
    n = len(piece.lead)
    if not all(part.start <= i < part.stop for part, i in zip(index, piece.lead, strict=False)):
      continue
    place = out[tuple(i - part.start for part, i in zip(index, piece.lead, strict=False))]
    starts = [part.start for part in index[n:]]
    for step in _steps(index[n:], out.itemsize):
      here = tuple(
        slice(part.start - start, part.stop - start) for part, start in zip(step, starts, strict=True)
      )
      copy(piece.layout.read(tensors[piece.name], stored.shape[n:], step), place[here])


def copy(values: np.ndarray, out: np.ndarray) -> None:
  """Sets out[...] = values."""
  values = contiguous(values)
  if values.dtype == out.dtype:  # as integers: for bfloat16 NumPy has only a slow loop
    bits = np.dtype(f"u{out.itemsize}")
    values, out = values.view(bits), out.view(bits)
  out[...] = values


def contiguous(values: np.ndarray) -> np.ndarray:
  """Returns the values with their last axis contiguous in memory.

  NumPy copies a transposed array element by element. The transfer of JAX does it in blocks, which is several times
  faster.
  """
  if values.flags.c_contiguous or not values.flags.aligned or values.size < _FEW:
    return values
  try:
    cpu = jax.local_devices(backend="cpu")[0]
  except RuntimeError:  # JAX_PLATFORMS leaves it out
    return np.ascontiguousarray(values)
  return np.asarray(jax.device_put(values, cpu))


def _steps(index: Index, itemsize: int) -> Iterator[Index]:
  """Cuts an index along its first axis into steps of bounded size."""
  if not index:
    yield index
    return
  first, *rest = index
  row = itemsize * math.prod(part.stop - part.start for part in rest)
  size = max(1, _STEP // max(row, 1))
  for start in itertools.count(first.start, size):
    if start >= first.stop:
      return
    yield (slice(start, min(start + size, first.stop)), *rest)
