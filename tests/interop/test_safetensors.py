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


def write_header(path, header, content=b"12345678"):
  """A file with any header."""
  text = json.dumps(header).encode()
  path.write_bytes(struct.pack("<Q", len(text)) + text + content)


def refused(path, match):
  with pytest.raises(InputError, match=match) as error:
    open_file(path)
  assert "\n" not in str(error.value) and len(str(error.value)) < len(str(path)) + 300


TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def test_types_and_sizes_that_do_not_fit(tmp_path):
  def of(match, **fields):
    write_header(tmp_path / "a", {"w": TENSOR | fields})
    refused(tmp_path / "a", match)

  of("w has type C64, which is not read", dtype="C64")
  of(r"w has 8 bytes, which is no F32\[3\]", shape=[3])


@pytest.mark.parametrize(
  "fields",
  [
    *({"dtype": dtype} for dtype in (None, ["F32"], 3)),
    *({"shape": shape} for shape in (None, [-1, -2], ["2"], [2.0], [True, 2], {"2": 1}, 2)),
    *({"data_offsets": places} for places in (None, [0.0, 8.0], [0, 8, 9], [8], "08", [False, 8], [-8, 8])),
  ],
)
def test_fields_that_are_not_those_of_the_format(fields, tmp_path):
  for changed in (TENSOR | fields, {key: x for key, x in TENSOR.items() if key not in fields}):
    write_header(tmp_path / "a", {"w": changed})
    refused(
      tmp_path / "a", r"is not a whole safetensors file \(its header says \{.* of w\); download it again"
    )


@pytest.mark.parametrize("header", [[1], None, "w", {"w": 3}, {"w": None}])
def test_headers_that_are_none(header, tmp_path):
  write_header(tmp_path / "a", header)
  refused(tmp_path / "a", "is not a whole safetensors file .*its header ")


HALF = TENSOR | {"shape": [1]}
PLACES = {
  "the same bytes": ({"a": TENSOR, "b": TENSOR}, "b begins at byte 0, and what is before it ends at 8"),
  "some of the same bytes": ({"a": TENSOR, "b": HALF | {"data_offsets": [4, 8]}}, "b begins at byte 4, "),
  "a hole": ({"a": HALF | {"data_offsets": [4, 8]}}, "a begins at byte 4, and what is before it ends at 0"),
  "the end first": ({"a": TENSOR | {"data_offsets": [8, 0]}}, "a ends before it begins"),
  "nothing inside": (
    {"a": TENSOR, "b": TENSOR | {"shape": [0], "data_offsets": [4, 4]}},
    "b begins at byte 4",
  ),
}


@pytest.mark.parametrize("name", PLACES)
def test_every_byte_is_that_of_one_tensor(name, tmp_path):
  header, match = PLACES[name]
  write_header(tmp_path / "a", header)
  refused(tmp_path / "a", f"is not a whole safetensors file .{match}")


@pytest.mark.parametrize("name", PLACES)
def test_the_library_refuses_the_same_places(name, tmp_path):
  library = pytest.importorskip("safetensors.numpy", reason="needs the extra 'parity'")
  write_header(tmp_path / "a", PLACES[name][0])
  with pytest.raises(Exception, match="offset"):
    library.load_file(tmp_path / "a")


def test_tensors_in_any_order_and_of_no_bytes(tmp_path):
  none = TENSOR | {"shape": [3, 0]}
  places = {"b": [4, 8], "a": [0, 4]}
  header = {name: HALF | {"data_offsets": place} for name, place in places.items()}
  write_header(tmp_path / "a", header | {f"none{at}": none | {"data_offsets": [at, at]} for at in (0, 4, 8)})
  found = open_file(tmp_path / "a")
  assert found["a"].tobytes() + found["b"].tobytes() == b"12345678" and found["none8"].shape == (3, 0)


@pytest.mark.parametrize("shape", [[0] * 100, [10**30, 0], [2**40, 2**40, 0]])
def test_shapes_that_numpy_has_not(shape, tmp_path):
  write_header(tmp_path / "a", {"w": TENSOR | {"shape": shape, "data_offsets": [0, 0]}}, b"")
  refused(tmp_path / "a", "w has a shape that NumPy has not")


def test_a_file_that_cannot_be_read_is_not_said_to_be_torn(tmp_path):
  refused(tmp_path, r"cannot be read \(Is a directory\)$")
