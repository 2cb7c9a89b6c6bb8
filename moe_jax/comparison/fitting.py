"""Of all arms that have names, those that can be made of a configuration: 8 groups of 4 experts, for one, cannot."""

from collections.abc import Callable, Mapping

from moe_jax import disk, sharding
from moe_jax.comparison.arms import Arm, arms_from_flag, with_arm
from moe_jax.config import Config
from moe_jax.errors import InputError
from moe_jax.training.compiled import check_run


def fitting_arms(
  flag: str, text: str, every: Mapping[str, Arm], parse: Callable[[str], Arm], config: Config
) -> dict[str, Arm]:
  """Returns the arms that a flag names, and of `all` those that can be made of `config`. A line names the others.

  If the first arm, the baseline, cannot be made, then `config` is wrong, which the comparison says: all are returned.

  Args:
    flag: as for `arms_from_flag`.
    text: as there.
    every: as there.
    parse: as there.
    config: what the arms change, not resolved.

  Raises:
    InputError: if no arm is named, or one is named twice, or `config` is wrong without any arm.
  """
  arms = arms_from_flag(flag, text, every, parse)
  if text.strip() != "all":
    return arms
  mesh, refused = sharding.make_mesh(config.check().mesh), {}
  for name, arm in arms.items():
    try:
      check_run(with_arm(config, arm), mesh)
    except InputError as error:
      refused[name] = error
  if not refused or next(iter(arms)) in refused:
    return arms
  why = "; ".join(f"{name} ({error})" for name, error in refused.items())
  disk.note(f"--{flag}=all: leaves out what cannot be made of this configuration: {why}")
  return {name: arm for name, arm in arms.items() if name not in refused}
