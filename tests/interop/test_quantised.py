"""Quantised tensors against loops over single values."""

import json
import pathlib

import ml_dtypes
import numpy as np
import pytest

import moe_jax
from moe_jax.errors import InputError
from moe_jax.interop.families import FAMILIES, Values
from moe_jax.interop.quantised import logical_tensors
from moe_jax.interop.safetensors import Pending, open_file, write_file
from tests.interop.helpers import assert_same_model, random_model
from tests.interop.test_families import CASES

RNG = np.random.default_rng(0)
FOLDER = pathlib.Path("folder")
BLOCK = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 3]}}


def parts_of(shape):
  """The whole array, and parts that begin and end inside of blocks."""
  yield tuple(slice(0, n) for n in shape)
  for _ in range(10):
    starts = [RNG.integers(0, n) for n in shape]
    yield tuple(slice(int(a), int(RNG.integers(a + 1, n + 1))) for a, n in zip(starts, shape, strict=True))


@pytest.mark.parametrize("scale_type", ["float32", "bfloat16", "uint8", "float8_e8m0fnu"])
def test_fp8_in_blocks(scale_type):
  """10 x 8 values in blocks of 4 x 3: both edges are ragged. A byte s stands for 2^(s - 127)."""
  values = RNG.normal(size=(10, 8)).astype(ml_dtypes.float8_e4m3fn)
  if scale_type == "uint8":
    scales = RNG.integers(120, 130, (3, 3)).astype(np.uint8)
    factors = 2.0 ** (scales.astype(int) - 127)
  elif scale_type == "float8_e8m0fnu":
    factors = 2.0 ** RNG.integers(-6, 6, (3, 3))
    scales = factors.astype(ml_dtypes.float8_e8m0fnu)
  else:
    scales = RNG.uniform(0.5, 2, (3, 3)).astype(scale_type)
    factors = scales.astype(np.float64)
  expected = np.empty((10, 8))
  for i in range(10):
    for j in range(8):
      expected[i, j] = float(values[i, j]) * factors[i // 4, j // 3]
  tensors = logical_tensors(FOLDER, {"w": values, "w_scale_inv": scales, "b": np.ones(2)}, BLOCK)
  assert set(tensors) == {"w", "b"} and tensors["w"].shape == (10, 8)
  for part in parts_of((10, 8)):
    np.testing.assert_allclose(tensors["w"][part], expected[part], rtol=1e-6)


def test_mxfp4():
  """E2M1: a sign, two bits of exponent with bias 1, one of mantissa. The lower four bits of a byte come first."""
  blocks = RNG.integers(0, 256, (2, 3, 2, 16)).astype(np.uint8)
  scales = RNG.integers(110, 140, (2, 3, 2)).astype(np.uint8)
  expected = np.empty((2, 3, 64))
  for e in range(2):
    for x in range(3):
      for y in range(64):
        byte = int(blocks[e, x, y // 32, y % 32 // 2])
        code = byte >> 4 if y % 2 else byte & 15
        exponent, mantissa = code >> 1 & 3, code & 1
        size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
        expected[e, x, y] = (-size if code & 8 else size) * 2.0 ** (int(scales[e, x, y // 32]) - 127)
  config = {"quantization_config": {"quant_method": "mxfp4"}}
  tensors = logical_tensors(FOLDER, {"w_blocks": blocks, "w_scales": scales}, config)
  assert set(tensors) == {"w_blocks"} and tensors["w_blocks"].shape == (2, 3, 64)
  for part in parts_of((2, 3, 64)):
    np.testing.assert_array_equal(tensors["w_blocks"][part], expected[part].astype(np.float32))


def test_a_model_in_fp8(tmp_path):
  """DeepSeek-V3 as it is published: matrices in FP8 with blocks, norms, router and embeddings in bf16."""
  values, _ = CASES["deepseek_v3"]
  moe_jax.save(
    random_model(FAMILIES["deepseek_v3"].read(Values("config.json", values)), 24), tmp_path / "plain"
  )
  config = json.loads((tmp_path / "plain/config.json").read_text()) | BLOCK
  quantised, expected = {}, {}
  for name, x in open_file(tmp_path / "plain/model.safetensors").items():
    if x.ndim < 2 or "gate.weight" in name or "layers" not in name:
      quantised[name] = expected[name] = np.array(x)
      continue
    scales = RNG.uniform(0.5, 2, [-(-n // size) for n, size in zip(x.shape, (4, 3), strict=True)]).astype(
      np.float32
    )
    quantised |= {name: x.astype(ml_dtypes.float8_e4m3fn), f"{name}_scale_inv": scales}
    whole = np.repeat(np.repeat(scales, 4, axis=0), 3, axis=1)[: x.shape[0], : x.shape[1]]
    expected[name] = quantised[name].astype(np.float32) * whole
  assert len(quantised) > len(expected) + 20
  write(tmp_path / "fp8", quantised, config)
  write(tmp_path / "float", expected, config)
  loaded = moe_jax.load(tmp_path / "fp8")
  assert_same_model(loaded.model, moe_jax.load(tmp_path / "float").model)
  moe_jax.save(loaded, tmp_path / "again")
  assert "quantization_config" not in json.loads((tmp_path / "again/config.json").read_text())
  assert_same_model(moe_jax.load(tmp_path / "again").model, loaded.model)


def write(folder, tensors, config):
  folder.mkdir()
  (folder / "config.json").write_text(json.dumps(config))
  pending = {name: Pending(x.shape, x.dtype, lambda x=x: x) for name, x in tensors.items()}
  write_file(folder / "model.safetensors", pending)


def test_scales_that_do_not_fit():
  values = np.zeros((10, 8), ml_dtypes.float8_e4m3fn)

  def refused(match, config=BLOCK, **stored):
    with pytest.raises(InputError, match=match) as error:
      logical_tensors(FOLDER, stored, config)
    assert "\n" not in str(error.value)

  refused(r"w \[10, 8\] in FP8 needs scales of shape \[3, 3\] in w_scale_inv, found none", w=values)
  refused(r"w_scale_inv, found \[3, 2\]", w=values, w_scale_inv=np.ones((3, 2)))
  blocks = np.zeros((3, 2, 16), np.uint8)
  refused(r"w_blocks needs scales of shape \[3, 2\]", w_blocks=blocks, w_scales=np.zeros((3, 1), np.uint8))
  refused("quant_method='awq' is not read", config={"quantization_config": {"quant_method": "awq"}}, w=values)
