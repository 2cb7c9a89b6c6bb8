"""What does capacity cost, and what does balancing buy at each capacity?

Question   Bits per byte and drops against the capacity factor, of training and of evaluation apart.
Command    python experiments/capacity.py
           python experiments/capacity.py --preset=tiny --output_dir=runs/capacity_tiny
           python experiments/capacity.py --methods=none,switch_loss:0.01 --group=sequence,batch --output_dir=runs/groups
           XLA_FLAGS=--xla_force_host_platform_device_count=8 python experiments/capacity.py --preset=tiny \\
             --expert_parallelism=8 --data_parallelism=1 --output_dir=runs/capacity_sharded
Hardware   two CPU cores, 2 GB; any JAX device
Minutes    about 10 for --preset=tiny on two CPU cores, estimated from a part of it, and mostly compilation. The default
           preset trains 90 runs (5 methods, 6 factors, 3 seeds), about 4 times those of experiments/load_balancing.py.
           --shard splits it over machines; after scripts/join.py, the command with --output_dir=JOINED draws the
           figures
Result     capacity.md in the folder

GShard and Switch are as their papers have them: dispatch and combine tensors (--dispatcher=einsum), groups, a capacity,
drops. The others are softmax top-k with a balancing method. Each is trained at every --capacity_factors, `none`
without a capacity, and evaluated at every --eval_capacity_factors from the same parameters. This is the question of
ST-MoE (2202.08906), Table 8, whose figures are put beside ours. A factor that is added later is evaluated without
training again.

--group says whose tokens share the slots of an expert: those of a sequence, of a batch, or of the sequences on one
device. Groups of a batch need the whole batch on one device.

Beside the files of a comparison it writes capacity.csv, capacity.md, capacity.png and dropped.png. With a capacity,
GShard's first choices come before all second ones, so a token's output depends on later tokens (docs/leaks.md). Such an
arm gets no verdict against others. Compare it where evaluation has no capacity, or with --objective=masked_lm.
"""

import functools
import pathlib
import shlex
import sys

from absl import flags

from moe_jax import cli
from moe_jax.cluster import start as distributed
from moe_jax.comparison import flags as comparison_flags

METHODS = "none,switch_loss:0.01,loss_free_bias:0.001@sigmoid_topk,switch_top1,gshard_top2"

_METHODS = flags.DEFINE_string(
  "methods",
  METHODS,
  "arms separated by commas: gshard_top2, switch_top1, or those of experiments/load_balancing.py; all: every one",
)
_FACTORS = flags.DEFINE_list(
  "capacity_factors", ["0.75", "1", "1.25", "2", "4", "none"], "slots per expert / (T*K/E) in training"
)
_EVAL_FACTORS = flags.DEFINE_list(
  "eval_capacity_factors", ["0.75", "1", "1.25", "2", "3", "none"], "the same in evaluation, of every arm"
)
_GROUP = flags.DEFINE_list("group", ["sequence"], "whose tokens share slots: sequence, batch, device")
_DISPATCHER = flags.DEFINE_string(
  "dispatcher",
  "einsum",
  "how tokens get to experts where a sequence or a batch has a capacity; sorted gives the same numbers",
)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", "runs/capacity", "the folder to write")
_SAID_HERE = ("router", "balancers", "dispatcher", "capacity_factor", "eval_capacity_factor", "group_size")
cli.define_flags(leave_out=(*_SAID_HERE, "seed", "data_seed"))
comparison_flags.define_flags(sweep=False)
distributed.define_flags()
for module in (cli, comparison_flags, distributed):
  flags.adopt_module_key_flags(module)  # shown by --help


def main(argv: list[str]) -> None:
  del argv
  # Imported here, so that --help and wrong flags answer at once.
  from moe_jax.analysis.capacity import report, study
  from moe_jax.comparison.arms import balancing_arm
  from moe_jax.comparison.comparison import Comparison
  from moe_jax.comparison.fitting import fitting_arms

  config = cli.config_from_flags()
  known = study.methods(config)
  plan = study.make_plan(
    config,
    fitting_arms("methods", _METHODS.value, known, balancing_arm, config),
    factors=study.parse_factors("capacity_factors", _FACTORS.value),
    eval_factors=study.parse_factors("eval_capacity_factors", _EVAL_FACTORS.value),
    groups=_GROUP.value,
    dispatcher=_DISPATCHER.value,
  )
  comparison = Comparison(
    plan.arms,
    config=config,
    output_dir=_OUTPUT_DIR.value,
    evaluations=plan.evaluations,
    **comparison_flags.arguments(),
  )
  comparison.report(
    comparison.run(),
    title="Capacity",
    question="What does capacity cost, and what does balancing buy at each capacity?",
    command=shlex.join(["python", *sys.argv]),
    notes=NOTES,
    varies=("slots",),
    # A shard has no figures: those are of the joined folder, for which this command runs again.
    beside=functools.partial(report.write, pathlib.Path(_OUTPUT_DIR.value)),
  )


NOTES = [
  "The numbers of an arm are those at its own capacity factor, in training and evaluation.",
  "Arms of different capacity factors have different numbers of slots, which is what is compared.",
  "With a capacity, gshard_top2 looks at later tokens of the sequence: all first choices come before any second one. "
  "Its perplexity is then not that of a language model. Evaluated without a capacity, it looks at none.",
  "In evaluation nothing is drawn: gshard_top2 uses all second experts.",
]

if __name__ == "__main__":
  cli.run(distributed.on_every_process(main))
