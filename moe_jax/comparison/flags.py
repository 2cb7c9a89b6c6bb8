"""The flags that comparisons share: seeds, a shard, and a sweep."""

from typing import Any

from absl import flags


def define_flags(sweep: bool = True, shard: bool = True) -> None:
  """Defines `--seeds`, `--first_seed`, with `shard` `--shard`, and with `sweep` `--sweep`, `--sweep_seeds` and `--sweep_goal`."""
  flags.DEFINE_integer("seeds", 3, "runs per arm, with seeds 0, 1, ...", lower_bound=1, upper_bound=10_000)
  flags.DEFINE_integer(
    "first_seed",
    0,
    "the first of --seeds; a question that earlier runs raised is answered by seeds that they did not use",
    lower_bound=0,
    upper_bound=2**31 - 10_001,
  )
  if shard:
    flags.DEFINE_string(
      "shard",
      "",
      "i/n, from 1/n to n/n: train only this part of the runs, in a folder of its own or one that all share; "
      "scripts/join.py joins folders",
    )
  if not sweep:
    return
  flags.DEFINE_multi_string(
    "sweep",
    [],
    "FIELD:VALUE,VALUE,...: every arm gets the best value of a config field, e.g. learning_rate:0.001,0.003, or of "
    "an option of its methods, e.g. weight:0.01,0.1 or switch_loss.weight:0.01,0.1; given twice: of every combination",
  )
  flags.DEFINE_list(
    "sweep_seeds", ["100", "101"], "seeds with which the values of --sweep are tried; none may be reported"
  )
  flags.DEFINE_string(
    "sweep_goal", "nll", "what decides between the values of --sweep: a column of the table, e.g. max_vio"
  )


def arguments() -> dict[str, Any]:
  """Returns the arguments of `Comparison` that these flags give.

  Raises:
    InputError: if one is wrong.
  """
  # Imported here, so that --help answers at once.
  from moe_jax.comparison.shard import Shard
  from moe_jax.comparison.sweep import Sweep
  from moe_jax.disk import note

  values = flags.FLAGS
  with_sweep = "sweep" in values and bool(values.sweep)
  for name in () if with_sweep else ("sweep_seeds", "sweep_goal"):
    if name in values and values[name].present:
      note(f"--{name} has no effect without --sweep")
  found = {
    "seeds": range(values.first_seed, values.first_seed + values.seeds),
    "shard": Shard.parse(values.shard if "shard" in values else ""),
  }
  if with_sweep:
    found["sweep"] = Sweep.parse(values.sweep, values.sweep_seeds, values.sweep_goal)
  return found
