"""A comparison over several machines: which part one process trains."""

import dataclasses
import pathlib
import re
from collections.abc import Sequence
from typing import TypeVar

from moe_jax.errors import InputError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Shard:
  """Part `index` of `count`, counted from 1. The parts are disjoint, and together they are everything."""

  index: int = 1
  count: int = 1

  @classmethod
  def parse(cls, text: str) -> "Shard":
    """Returns the shard for "2/4", the second of four. Empty: everything.

    Raises:
      InputError: if `text` is anything else.
    """
    if not text:
      return cls()
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    index, count = map(int, found.groups()) if found else (0, 0)
    if not 1 <= index <= count:
      raise InputError(f"--shard={text}: must be i/n with i from 1 to n, e.g. 1/4 and so on to 4/4")
    return cls(index, count)

  def part(self, items: Sequence[T]) -> list[T]:
    """Returns every `count`-th item, which depends on nothing but their order."""
    return list(items[self.index - 1 :: self.count])

  def in_words(self, num_runs: int, folder: pathlib.Path) -> str:
    """Returns how to go on when this part of `num_runs` is done in `folder`."""
    return (
      f"shard {self} is done, number of runs: {num_runs}, in {folder}. When all shards are done: "
      "python scripts/join.py FOLDER... --output_dir=JOINED. Where all shards have written one folder: this command "
      "without --shard."
    )

  def __str__(self) -> str:
    return f"{self.index}/{self.count}"
