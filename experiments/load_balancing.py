"""Does a balancing method balance, and what does it cost in perplexity?

Question   Perplexity beside MaxVio for balancing methods: same model, same batches, several seeds.
Command    python experiments/load_balancing.py
           python experiments/load_balancing.py --methods=none,switch_loss:0.01+z_loss:0.001 --seeds=5
           python experiments/load_balancing.py --methods=all --output_dir=runs/every_method
           python experiments/load_balancing.py --sweep=weight:0.003,0.01,0.03 --sweep=rate:0.001,0.003,0.01 --output_dir=runs/best
           python experiments/load_balancing.py --shard=1/4 --output_dir=runs/part_1   # then scripts/join.py
Hardware   two CPU cores, 2 GB; any JAX device
Minutes    about 4 for the default on two CPU cores
Result     MaxVio over the validation set: none > switch_loss > loss_free_bias, see docs/LOG.md

Writes one folder: config.json, metrics.jsonl, summary.csv, plots, report.html, and one folder per arm
and seed under arms/. Run again with the same flags, it keeps the runs that are done and continues the
one that was stopped. --sweep trains every arm at the best value of a field or option, chosen on other seeds
(sweep.csv lists what was tried), and --shard trains a part of the runs, on several machines.
"""

import shlex
import sys

from absl import flags

from moe_jax import cli
from moe_jax.cluster import start as distributed
from moe_jax.comparison import flags as comparison_flags

METHODS = "none,switch_loss:0.01,loss_free_bias:0.003"

_METHODS = flags.DEFINE_string(
  "methods",
  METHODS,
  "all, or arms separated by commas; an arm joins balancers by +, e.g. switch_loss:0.01+z_loss:0.001, and may "
  "bring its own router, e.g. load_loss:0.1@noisy_topk; or a name in moe_jax/comparison/arms.py, e.g. deepseek_v3",
)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", "runs/load_balancing", "the folder to write")
cli.define_flags(leave_out=("balancers", "seed", "data_seed"))
comparison_flags.define_flags()
distributed.define_flags()
for module in (cli, comparison_flags, distributed):
  flags.adopt_module_key_flags(module)  # shown by --help


def main(argv: list[str]) -> None:
  del argv
  # Imported here, so that --help and wrong flags answer at once.
  from moe_jax.comparison.arms import BALANCING, arms_from_flag, balancing_arm
  from moe_jax.comparison.comparison import Comparison

  comparison = Comparison(
    arms=arms_from_flag("methods", _METHODS.value, BALANCING, balancing_arm),
    config=cli.config_from_flags(),
    output_dir=_OUTPUT_DIR.value,
    **comparison_flags.arguments(),
  )
  results = comparison.run()
  comparison.report(
    results,
    title="Load balancing",
    question="Which method balances the experts, and at what perplexity?",
    command=shlex.join(["python", *sys.argv]),
    notes=NOTES,
  )


# Shown in the report. The numbers come from the command in docs/LOG.md, "Which bias step".
NOTES = [
  "The bias step of loss_free_bias is 0.003 and not the paper's 0.001, because a step bounds the bias that "
  "a run can reach by steps x rate. With the default model over 180 steps, MaxVio global is 1.01 at 0.001, "
  "0.34 at 0.003, 0.52 at 0.01 and 1.65 at 0.03 (means of two seeds); perplexity does not tell them apart. "
  "Longer runs can use a smaller step.",
  "The weight of switch_loss is 0.01, as in the Switch paper; the loss is 1 x weight at perfect balance.",
  "Capacity drops assignments in training (--capacity_factor) and in validation (--eval_capacity_factor), so "
  "perplexity includes what imbalance costs there; --dispatcher=dropless takes that away.",
]

if __name__ == "__main__":
  cli.run(distributed.on_every_process(main))
