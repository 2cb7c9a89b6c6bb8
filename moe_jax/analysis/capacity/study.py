"""The arms of the capacity study, and the evaluations of each."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from moe_jax.comparison.arms import Arm, balancing
from moe_jax.config import Config
from moe_jax.errors import InputError

NONE = "none"  # the factor of training or evaluation without a capacity
GROUPS = ("sequence", "batch", "device")


class Setting(NamedTuple):
  """What one arm is."""

  method: str
  factor: str  # of training, as text, or NONE
  group: str  # whose tokens share the slots of an expert; empty without a capacity

  @classmethod
  def parse(cls, arm: str) -> "Setting | None":
    """Returns the setting of the arm of this name; None for an arm of another study."""
    method, _, rest = arm.partition(" ")
    if rest == "dropless":
      return cls(method, NONE, "")
    factor, _, group = rest.partition(" ")
    return cls(method, factor, group) if group in GROUPS else None

  def __str__(self) -> str:
    return f"{self.method} dropless" if self.factor == NONE else " ".join(self)


class Plan(NamedTuple):
  """A comparison of capacity factors."""

  arms: dict[str, Arm]
  evaluations: dict[str, dict[str, Arm]]  # arm -> name of the evaluation -> fields


def methods(config: Config) -> dict[str, Arm]:
  """Returns the methods with names of their own: the two of the papers, and the arms of balancing.

  GShard (2006.16668) and Switch (2101.03961) are as published: the random second expert; one expert, jitter of 0.01
  and initial weights of a tenth of the variance. K x F, the width that a token sees, is the same in both, so Switch's
  experts are twice as wide. At equal factors a layer then has half the slots, of twice the width.
  """
  moe = config.model.moe
  gshard = {"router": "gshard_top2", "balancers": "gshard_loss:0.01", "accept_leaks": "gshard_top2"}
  switch = {"router": "switch_top1", "balancers": "switch_loss:0.01", "jitter": 0.01, "init_scale": 0.1}
  switch |= {"num_experts_per_token": 1, "expert_dim": moe.num_experts_per_token * moe.expert_dim}
  return {"gshard_top2": gshard, "switch_top1": switch} | balancing(config)


def parse_factors(flag: str, texts: Sequence[str]) -> list[str]:
  """Returns capacity factors as the shortest texts of their values.

  Raises:
    InputError: if one is neither `none` nor above 0, or is given twice.
  """
  found = [_parse_factor(flag, text.strip()) for text in texts]
  if not found or len(set(found)) < len(found):
    raise InputError(f"--{flag}={','.join(texts)}: must be different factors, e.g. 0.75,1,1.25,none")
  return found


def _parse_factor(flag: str, text: str) -> str:
  if text == NONE:
    return NONE
  try:
    value = float(text)
  except ValueError:
    value = math.nan
  if not 0 < value < math.inf:
    raise InputError(f"--{flag}={text}: must be a number above 0, or {NONE} for no capacity")
  return f"{value:g}"


def make_plan(
  config: Config,
  chosen: Mapping[str, Arm],
  *,
  factors: Sequence[str],
  eval_factors: Sequence[str],
  groups: Sequence[str],
  dispatcher: str,
) -> Plan:
  """Returns an arm for every method, factor and group, and its evaluations.

  An arm with a capacity is evaluated in groups of its own kind, and one without in groups of every kind.

  Args:
    config: of every run.
    chosen: the methods, by name.
    factors: capacity factors of training, as `parse_factors` returns them.
    eval_factors: those of evaluation.
    groups: of `GROUPS`.
    dispatcher: how tokens get to experts where groups of a sequence or a batch have a capacity.

  Raises:
    InputError: if a group is unknown or given twice.
  """
  if not groups or not {*groups} <= {*GROUPS} or len(set(groups)) < len(groups):
    raise InputError(f"--group={','.join(groups)}: must be different ones of {', '.join(GROUPS)}")
  settings = [
    Setting(method, factor, group)
    for method in chosen
    for factor in sorted(factors, key=lambda factor: factor != NONE)  # the first arm is the baseline
    for group in (groups if factor != NONE else ("",))
  ]

  def arm(setting: Setting) -> Arm:
    fields = _capacity(config, setting.factor, setting.group, dispatcher)
    # `validation` in the results is at the factor of training, so that what a deployed model would do is there.
    own = {} if setting.factor == NONE else {name: float(setting.factor) for name in _FACTORS}
    return {**chosen[setting.method], **fields, **own}

  def evaluations(setting: Setting) -> dict[str, Arm]:
    found = {}
    for factor in eval_factors:
      for group in [""] if factor == NONE else [setting.group] if setting.group else groups:
        fields = _capacity(config, factor, group, dispatcher)
        own = {} if factor == NONE else {"eval_capacity_factor": float(factor)}
        found[" ".join(filter(None, (factor, group)))] = fields | own
    return found

  return Plan(
    arms={str(s): arm(s) for s in settings},
    evaluations={str(s): evaluations(s) for s in settings},
  )


_FACTORS = ("capacity_factor", "eval_capacity_factor")


def _capacity(config: Config, factor: str, group: str, dispatcher: str) -> dict[str, Any]:
  """Returns the fields that make the tokens of a group share slots, or that take the capacity away."""
  if factor == NONE:
    return {"dispatcher": "dropless", "group_size": 0, "eval_capacity_factor": 1.0}
  length = config.data.sequence_length
  if group == "device":
    return {"dispatcher": "all_to_all:capacity=device", "group_size": length}
  sequences = config.data.batch_size // config.train.accumulation if group == "batch" else 1
  return {"dispatcher": dispatcher, "group_size": sequences * length}
