"""The columns of a table by which a sweep may choose, and which arms have them."""

from collections.abc import Mapping, Sequence

from moe_jax.comparison.statistics import columns_of
from moe_jax.config import Config
from moe_jax.data.dataset import DatasetInfo
from moe_jax.errors import InputError
from moe_jax.training.protocol import protocol_of
from moe_jax.training.results import table_columns


def goals() -> list[str]:
  """Returns the keys of the columns that may decide: those with a better direction, but speed, which the machine decides."""
  columns = columns_of([{"columns": table_columns()}])
  return [c.key for c in columns if c.lower_is_better is not None and c.key != "tokens_per_second"]


def check_goal(
  goal: str,
  tried: Mapping[str, Sequence[str]],
  configs: Mapping[str, Config],
  infos: Mapping[str, DatasetInfo],
) -> None:
  """Raises `InputError` if what is tried of an arm would have no number in the column that decides.

  Args:
    goal: the key of the column.
    tried: the candidates of every arm, by name. One alone is not chosen by anything.
    configs: the resolved configuration of every candidate.
    infos: of the data that every candidate reads.
  """
  for arm, names in tried.items():
    lacking = [name for name in names if len(names) > 1 and _lacks(configs[name], infos[name], goal)]
    if lacking:
      which = arm if len(lacking) == len(names) else lacking[0]
      raise InputError(
        f"--sweep_goal={goal}: arm {which} has no {goal}; leave the arm out or choose another goal"
      )


def _lacks(config: Config, info: DatasetInfo, goal: str) -> bool:
  if any(entry["key"] == goal for entry in table_columns()):  # a metric of layers with experts
    return protocol_of(config)["model"]["num_experts"] in ([], [1])
  floors = (info.validation_floor, info.entropy_rate) if config.model.causal else (None, None)
  return goal == "excess_nll" and floors == (None, None)
