"""Layouts: how an array of ours lies in a tensor of a checkpoint, written as `"(N H) D -> D N H"`.

On the left is the tensor in the file, on the right the array here. Words are axes, and parentheses join axes into one,
the outer axis first. An axis that is only on the left has one fixed index: with `"(i F) D -> D F"` and i=(1, 2),
the array is the second half of the tensor. An axis may also be a range of the one in the file: with X=(128, 256),
the array has the columns from 128 on, of 256.
"""

import math
import re
from typing import NamedTuple

import numpy as np


class Span(NamedTuple):
  """Where the indices of an axis are in the file: from `first` on, of `total`."""

  first: int
  total: int


class Layout:
  """A way to read an array from a tensor of a checkpoint, and to write it back.

  Args:
    text: such as `"(N H) D -> D N H"`.
    spans: (first, total) of every axis of which the array has one index or a range. All others are whole.
  """

  def __init__(self, text: str, **spans: tuple[int, int]):
    left, right = text.split("->")
    groups = re.findall(r"\(([^)]*)\)|(\S+)", left)
    self.text, self.groups = text, [(joined or alone).split() for joined, alone in groups]
    self.right, self.spans = right.split(), {axis: Span(*span) for axis, span in spans.items()}
    self.left = [axis for group in self.groups for axis in group]
    fixed = set(self.left) - set(self.right)
    assert set(self.right) <= set(self.left) and fixed <= self.spans.keys() <= set(self.left), text

  def __repr__(self) -> str:
    return f"Layout({self.text!r})"

  def _totals(self, shape: tuple[int, ...]) -> dict[str, int]:
    """The size of every axis in the file, for an array of `shape`."""
    assert len(shape) == len(self.right), (self.text, shape)
    sizes = dict(zip(self.right, shape, strict=True))
    return sizes | {axis: span.total for axis, span in self.spans.items()}

  def file_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of the tensor in the file for an array of `shape`."""
    totals = self._totals(shape)
    return tuple(math.prod(totals[axis] for axis in group) for group in self.groups)

  def _ranges(self, index: dict[str, slice]) -> dict[str, slice]:
    """The range of every axis in the file, for a range of every axis of the array."""
    ranges = {}
    for axis in self.left:
      first = self.spans[axis].first if axis in self.spans else 0
      own = index.get(axis, slice(0, 1))
      ranges[axis] = slice(first + own.start, first + own.stop)
    return ranges

  def read(self, tensor, shape: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
    """Returns the part `index` of the array of `shape`, from `tensor`, of which only what is needed is read.

    Args:
      tensor: has the shape `file_shape(shape)`, and `tensor[slices]` returns an array.
      shape: of the whole array.
      index: a slice with start and stop for each axis of the array.
    """
    totals, ranges = self._totals(shape), self._ranges(dict(zip(self.right, index, strict=True)))
    slices, sizes, inner = [], [], []
    for group in self.groups:
      start, length = (
        0,
        1,
      )  # what is read of the joined axis: a range of one axis, at fixed indices of those outside
      for axis in group:
        if length == 1:
          start, length = start * totals[axis] + ranges[axis].start, ranges[axis].stop - ranges[axis].start
          sizes.append(length)
          inner.append(slice(None))
        else:
          start, length = start * totals[axis], length * totals[axis]
          sizes.append(totals[axis])
          inner.append(ranges[axis])
      slices.append(slice(start, start + length))
    return self._to_right(tensor[tuple(slices)].reshape(sizes)[tuple(inner)])

  def place(self, array: np.ndarray, tensor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns a whole array in the order of the file, and its place in `tensor`. Both are views of the same shape."""
    totals = self._totals(array.shape)
    ranges = self._ranges({axis: slice(0, n) for axis, n in zip(self.right, array.shape, strict=True)})
    place = tensor.reshape([totals[axis] for axis in self.left])[tuple(ranges[axis] for axis in self.left)]
    kept = [axis for axis in self.left if axis in self.right]
    in_order = array.transpose([self.right.index(axis) for axis in kept])
    return in_order, place[tuple(0 if axis not in self.right else slice(None) for axis in self.left)]

  def _to_right(self, values: np.ndarray) -> np.ndarray:
    """From the axes on the left, each by itself, to those on the right. A view."""
    kept = tuple(0 if axis not in self.right else slice(None) for axis in self.left)
    remaining = [axis for axis in self.left if axis in self.right]
    return values[kept].transpose([remaining.index(axis) for axis in self.right])
