"""The file format: what is written is read back, in parts, and a torn file is said to be one."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest

from moe_jax.errors import InputError
from moe_jax.interop.safetensors import DTYPES, Pending, open_file, write_file

RNG = np.random.default_rng(0)


def random_of(dtype):
  """Random values of any type, by their bytes."""
  if dtype == np.bool_:
    return RNG.integers(0, 2, (3, 4)).astype(dtype)
  return RNG.integers(0, 256, (3, 4 * dtype.itemsize)).astype(np.uint8).view(dtype)


def write(path, **arrays):
  write_file(path, {name: Pending(x.shape, x.dtype, lambda x=x: x) for name, x in arrays.items()})


@pytest.mark.parametrize("name", DTYPES)
def test_what_is_written_is_read_back(name, tmp_path):
  x = random_of(DTYPES[name])
  write(
    tmp_path / "a.safetensors", odd=np.zeros(3, np.uint8), x=x, scalar=np.float32(2).reshape(()), none=x[:0]
  )
  found = open_file(tmp_path / "a.safetensors")
  assert found["x"].dtype == x.dtype and found["none"].shape == (0, 4)
  assert found["x"].tobytes() == x.tobytes() and found["scalar"] == 2
  assert found["x"][1:, 2:3].tobytes() == x[1:, 2:3].tobytes()


def test_a_file_written_by_hand(tmp_path):
  """The format as its documentation has it: the length of the header, the header, and the bytes."""
  header = json.dumps(
    {"w": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}, "__metadata__": {"a": "b"}}
  )
  content = np.array([1.5, -2], ml_dtypes.bfloat16).tobytes()
  (tmp_path / "a").write_bytes(struct.pack("<Q", len(header)) + header.encode() + content)
  assert open_file(tmp_path / "a")["w"].astype(np.float32).tolist() == [1.5, -2]


def test_the_library_reads_what_is_written(tmp_path):
  library = pytest.importorskip("safetensors.numpy", reason="needs the extra 'parity'")
  x = RNG.normal(size=(3, 5)).astype(np.float32)
  write(tmp_path / "a.safetensors", x=x, y=x[0])
  found = library.load_file(tmp_path / "a.safetensors")
  np.testing.assert_array_equal(found["x"], x)
  np.testing.assert_array_equal(found["y"], x[0])


@pytest.mark.parametrize("kept", [0, 5, 20, -1, "more"])
def test_a_torn_file_is_refused(kept, tmp_path):
  path = tmp_path / "model.safetensors"
  write(path, x=np.ones((2, 3), np.float32))
  content = path.read_bytes()
  path.write_bytes(content + b"x" if kept == "more" else content[:kept])
  with pytest.raises(
    InputError, match=r"model.safetensors: is not a whole safetensors file .*download it again"
  ) as error:
    open_file(path)
  assert "\n" not in str(error.value)


def test_types_and_sizes_that_do_not_fit(tmp_path):
  def refused(match, **fields):
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | fields}).encode()
    (tmp_path / "a").write_bytes(struct.pack("<Q", len(header)) + header + b"1234")
    with pytest.raises(InputError, match=match):
      open_file(tmp_path / "a")

  refused("w has type C64, which is not read", dtype="C64")
  refused(r"w has 4 bytes, which is no F32\[2\]", shape=[2])
