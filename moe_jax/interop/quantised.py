"""Tensors of a checkpoint as they are used: quantised ones are dequantised block by block when they are read.

FP8 (DeepSeek-V3): `NAME` in E4M3, and `NAME_scale_inv` with a factor for every block of 128 x 128, the last ones of
a row or column cut off. MXFP4 (gpt-oss, OCP Microscaling Formats 1.0): `NAME_blocks` with two values of E2M1 in a
byte, the lower bits first, and `NAME_scales` with a power of two for every 32 values.
"""

import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from moe_jax.errors import InputError

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_FP8 = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))
_SCALE, _BLOCKS, _SCALES = "_scale_inv", "_blocks", "_scales"


class Tensor(Protocol):
  """A tensor of a checkpoint: `tensor[slices]` reads a part, with a slice for each of its axes."""

  @property
  def shape(self) -> tuple[int, ...]: ...

  @property
  def dtype(self) -> np.dtype: ...

  def __getitem__(self, slices: tuple[slice, ...]) -> np.ndarray: ...


def powers_of_two(scale: np.ndarray) -> np.ndarray:
  """Returns scales as float32. Bytes are exponents with a bias of 127, as in E8M0."""
  return (
    np.ldexp(np.float32(1), scale.astype(np.int32) - 127)
    if scale.dtype == np.uint8
    else scale.astype(np.float32)
  )


class Blockwise:
  """A matrix in FP8 times a scale for each block.

  Args:
    values: [X, Y] in FP8.
    scales: [ceil(X / rows), ceil(Y / columns)]; float, or uint8 exponents.
    block: (rows, columns) of a block.
  """

  dtype = np.dtype(np.float32)

  def __init__(self, values: np.ndarray, scales: np.ndarray, block: tuple[int, int]):
    self.values, self.scales, self.block, self.shape = values, scales, block, values.shape

  def __getitem__(self, slices: tuple[slice, ...]) -> np.ndarray:
    scale = self.scales
    for axis, (part, size) in enumerate(zip(slices, self.block, strict=True)):
      start, stop, _ = part.indices(self.shape[axis])
      scale = np.take(scale, np.arange(start, stop) // size, axis=axis)
    return self.values[slices].astype(np.float32) * powers_of_two(scale)


class MXFP4:
  """An array of 4-bit floats with a power of two for every 32 along its last axis.

  Args:
    blocks: [..., blocks, 16], uint8.
    scales: [..., blocks], uint8.
  """

  dtype = np.dtype(np.float32)

  def __init__(self, blocks: np.ndarray, scales: np.ndarray):
    self.blocks, self.scales = blocks, scales
    self.size = 2 * blocks.shape[-1]
    self.shape = (*blocks.shape[:-2], blocks.shape[-2] * self.size)

  def __getitem__(self, slices: tuple[slice, ...]) -> np.ndarray:
    *outer, last = slices
    start, stop, _ = last.indices(self.shape[-1])
    whole = slice(start // self.size, -(-stop // self.size))
    packed = self.blocks[(*outer, whole)]
    values = np.stack([E2M1[packed & 15], E2M1[packed >> 4]], axis=-1).reshape(*packed.shape[:-1], self.size)
    values = values * powers_of_two(self.scales[(*outer, whole)])[..., None]
    first = whole.start * self.size
    return values.reshape(*values.shape[:-2], -1)[..., start - first : stop - first]


def quantisation(path: pathlib.Path, config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns `quantization_config` of a config.json, empty if it has none.

  Raises:
    InputError: if it is no object, or the size of its blocks is not two positive integers.
  """
  settings = config.get("quantization_config") or {}
  where = f"{path / 'config.json'}: quantization_config"
  if not isinstance(settings, dict):
    right = 'an object such as {"quant_method": "fp8"}'
    raise InputError(f"{where}={repr(settings)[:60]}: must be {right}, or left out")
  block = settings.get("weight_block_size") or [128, 128]
  if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
    raise InputError(f"{where}.weight_block_size={repr(block)[:60]}: must be two positive integers")
  return settings


def logical_tensors(
  path: pathlib.Path, stored: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> dict[str, Tensor]:
  """Returns the tensors by name, quantised ones together with their scales.

  Raises:
    InputError: if scales are missing or do not fit, or the checkpoint has another kind of quantisation.
  """
  settings = quantisation(path, config)
  method = settings.get("quant_method", "")
  if method not in ("", "fp8", "mxfp4"):
    right = "is read as bf16, float32, fp8 (blocks) or mxfp4"
    raise InputError(f"{path}: quant_method={method!r} is not read; a checkpoint {right}")
  block = tuple(settings.get("weight_block_size") or (128, 128))
  tensors: dict[str, Tensor] = {}
  for name, values in stored.items():
    if name.endswith((_SCALE, _SCALES)) and _scaled(name) in stored:
      continue
    if values.dtype in _FP8:
      tensors[name] = _blockwise(path, name, values, stored.get(name + _SCALE), block)
    elif name.endswith(_BLOCKS) and values.dtype == np.uint8:
      scales = stored.get(name.removesuffix(_BLOCKS) + _SCALES)
      if scales is None or scales.shape != values.shape[:-1]:
        raise InputError(f"{path}: {name} needs scales of shape {list(values.shape[:-1])} in {_SCALES}")
      tensors[name] = MXFP4(values, scales)
    else:
      tensors[name] = values
  return tensors


def _scaled(name: str) -> str:
  """The name of the tensor that these scales belong to."""
  if name.endswith(_SCALE):
    return name.removesuffix(_SCALE)
  return name.removesuffix(_SCALES) + _BLOCKS


def _blockwise(
  path: pathlib.Path, name: str, values: np.ndarray, scales: np.ndarray | None, block: tuple[int, int]
) -> Blockwise:
  right = [-(-size // part) for size, part in zip(values.shape, block, strict=False)]
  if scales is None or values.ndim != 2 or list(scales.shape) != right:
    found = "none" if scales is None else list(scales.shape)
    raise InputError(
      f"{path}: {name} {list(values.shape)} in FP8 needs scales of shape {right} in {name}{_SCALE}, found {found}"
    )
  return Blockwise(values, scales, block)
