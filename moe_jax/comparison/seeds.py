"""The seeds of a comparison."""

import dataclasses
from collections.abc import Iterable
from numbers import Integral

from moe_jax.config import Config
from moe_jax.errors import InputError


def checked_seeds(seeds: Iterable[int]) -> list[int]:
  """Returns the seeds as Python's integers.

  Raises:
    InputError: if there is none, one is there twice, or one is no integer from 0 to 2^31 - 1.
  """
  seeds = list(seeds)
  wrong = [s for s in seeds if isinstance(s, bool) or not (isinstance(s, Integral) and 0 <= s < 1 << 31)]
  if wrong:
    raise InputError(f"seeds: {str(wrong[0])[:40]} is no integer from 0 to 2^31 - 1")
  if len(set(seeds)) < len(seeds):
    twice = next(seed for seed in seeds if seeds.count(seed) > 1)
    raise InputError(f"seeds: {twice} is there twice, and would count as two runs")
  if not seeds:
    raise InputError("seeds: there is none; give at least one, e.g. [0, 1, 2]")
  return [int(seed) for seed in seeds]


def with_seed(config: Config, seed: int) -> Config:
  """Returns the configuration of the run with a seed."""
  data, train = dataclasses.replace(config.data, data_seed=seed), dataclasses.replace(config.train, seed=seed)
  return dataclasses.replace(config, data=data, train=train)
