"""The tensors that parameters lie in, as the families name them."""

from collections.abc import Mapping
from typing import NamedTuple

from moe_jax.interop.layout import Layout


class Source(NamedTuple):
  """A tensor, or one for each expert, and how a parameter lies in it.

  `{e}` in the name is the number of the expert. The layout then is that of one expert. With `index`, it is that of
  parameter[index], and the entry has a source for every index.
  """

  name: str
  layout: Layout
  index: int | None = None


# parameter -> the tensors that it may lie in. The first is written. Names of a block's parameters and tensors are
# relative to the block: "mixer.w_out_NHD", "self_attn.o_proj.weight".
Names = Mapping[str, tuple[Source, ...]]


def source(name: str, layout: str, index: int | None = None, **spans: tuple[int, int]) -> tuple[Source]:
  """Returns an entry of `Names`. Entries are added up where a parameter may lie in one of several tensors."""
  return (Source(name, Layout(layout, **spans), index),)
