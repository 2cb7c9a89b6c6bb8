"""Layouts against NumPy by hand, in both directions and in parts."""

import numpy as np
import pytest

from moe_jax.interop.layout import Layout

N, H, D, E, F, X, Y = 3, 4, 5, 2, 6, 7, 2
RNG = np.random.default_rng(0)

# layout -> (shape of the tensor in the file, what NumPy takes of it)
CASES = {
  "transposed": (Layout("F D -> D F"), (F, D), lambda w: w.T),
  "heads": (Layout("(N H) D -> D N H"), (N * H, D), lambda w: w.T.reshape(D, N, H)),
  "out of heads": (Layout("D (N H) -> N H D"), (D, N * H), lambda w: w.T.reshape(N, H, D)),
  "a half": (Layout("E (i F) D -> E D F", i=(1, 2)), (E, 2 * F, D), lambda w: w[:, F:].swapaxes(1, 2)),
  "every other": (Layout("E D (F i) -> E D F", i=(1, 2)), (E, D, 2 * F), lambda w: w[..., 1::2]),
  "rows": (Layout("X D -> D X", X=(2, 11)), (11, D), lambda w: w[2:9].T),
  "columns of heads": (
    Layout("(N X) Y -> Y N X", X=(4, 11)),
    (N * 11, Y),
    lambda w: w.reshape(N, 11, Y)[:, 4:].transpose(2, 0, 1),
  ),
  "key of lightning": (
    Layout("(N i H) D -> D N H", i=(1, 3)),
    (N * 3 * H, D),
    lambda w: w.T.reshape(D, N, 3, H)[:, :, 1],
  ),
  "a row": (Layout("i D -> D", i=(0, 1)), (1, D), lambda w: w[0]),
}


def write(layout, array, tensor):
  values, place = layout.place(array, tensor)
  place[...] = values


@pytest.mark.parametrize("name", CASES)
def test_an_array_is_read_from_its_tensor(name):
  layout, shape, take = CASES[name]
  tensor = RNG.normal(size=shape)
  expected = take(tensor)
  assert layout.file_shape(expected.shape) == shape
  whole = tuple(slice(0, n) for n in expected.shape)
  np.testing.assert_array_equal(layout.read(tensor, expected.shape, whole), expected)


@pytest.mark.parametrize("name", CASES)
def test_a_part_is_read_alone(name):
  """And no more of the tensor is touched than the rows that hold the part."""
  layout, shape, take = CASES[name]
  expected = take(RNG.normal(size=shape))
  tensor = np.zeros(shape)
  write(layout, expected, tensor)
  for axis, size in enumerate(expected.shape):
    for start, stop in ((0, 1), (size // 2, size), (1, max(size - 1, 2))):
      part = tuple(slice(start, stop) if i == axis else slice(0, n) for i, n in enumerate(expected.shape))
      np.testing.assert_array_equal(layout.read(tensor, expected.shape, part), expected[part])


@pytest.mark.parametrize("name", CASES)
def test_writing_is_the_inverse_of_reading(name):
  layout, shape, take = CASES[name]
  array = RNG.normal(size=take(np.zeros(shape)).shape)
  tensor = np.full(shape, np.nan)
  write(layout, array, tensor)
  np.testing.assert_array_equal(take(tensor), array)
  assert np.isnan(tensor).sum() == tensor.size - array.size  # and nothing else was touched
