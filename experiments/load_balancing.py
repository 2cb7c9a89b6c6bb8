"""Does a balancing method balance, and what does it cost in quality?

Question   Bits per byte beside MaxVio for balancing methods: same model, same batches, several seeds.
Command    python experiments/load_balancing.py --seeds=5
           python experiments/load_balancing.py --preset=quick
           python experiments/load_balancing.py --methods=none,switch_loss:0.01+z_loss:0.001
           python experiments/load_balancing.py --methods=all --output_dir=runs/every_method
           python experiments/load_balancing.py --sweep=weight:0.003,0.01,0.03 --sweep=rate:0.001,0.003,0.01 --output_dir=runs/best
           python experiments/load_balancing.py --shard=1/4 --output_dir=runs/part_1   # then scripts/join.py
Hardware   two CPU cores, 2 GB; any JAX device
Minutes    under 3 with --preset=quick; about 60 for the default with five seeds, on two CPU cores
Result     mean MaxVio over the validation set: none > switch_loss > loss_free_bias; see README.md

Writes one folder: config.json, metrics.jsonl, summary.csv, plots, report.html, and one folder per arm
and seed under arms/. If it is interrupted, run it again with the same flags to resume it. --sweep trains
every arm at the best value of a field or option, chosen on other seeds (sweep.csv lists what was tried),
and --shard trains a part of the runs, on several machines.
"""

import shlex
import sys

from absl import flags

from moe_jax import cli
from moe_jax.cluster import start as distributed
from moe_jax.comparison import flags as comparison_flags

METHODS = (
  "none,none@sigmoid_topk,switch_loss:0.01,loss_free_bias:0.001@sigmoid_topk,loss_free_bias:0.001:rule=proportional,"
  "hash_topk,dense,dense_total"
)
# A bias cannot move further than steps x rate, and the tour has few steps.
QUICK_METHODS = "none,switch_loss:0.01,loss_free_bias:0.01@sigmoid_topk"

_METHODS = flags.DEFINE_string(
  "methods",
  "",
  "all, or arms separated by commas; an arm joins balancers by +, e.g. switch_loss:0.01+z_loss:0.001, and may "
  "bring its own router, e.g. load_loss:0.1@noisy_topk; or a name in moe_jax/comparison/arms.py, e.g. deepseek_v3; "
  f"empty: {METHODS}, and with --preset=quick {QUICK_METHODS}",
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
  from moe_jax.comparison.arms import balancing, balancing_arm, published_notes
  from moe_jax.comparison.comparison import Comparison
  from moe_jax.comparison.fitting import fitting_arms

  config = cli.config_from_flags()
  quick = flags.FLAGS.preset == "quick"
  methods = _METHODS.value or (QUICK_METHODS if quick else METHODS)
  comparison = Comparison(
    arms=fitting_arms("methods", methods, balancing(config), balancing_arm, config),
    config=config,
    output_dir=_OUTPUT_DIR.value,
    **comparison_flags.arguments(),
  )
  results = comparison.run()
  comparison.report(
    results,
    title="Load balancing",
    question="Which method balances the experts, and at what quality?",
    command=shlex.join(["python", *sys.argv]),
    notes=[*(tour(config) if quick else []), *NOTES, *published_notes(comparison.arms, config)],
  )


def tour(config) -> list[str]:
  """Returns a note on runs as short as those of --preset=quick; none if these are of other lengths."""
  from moe_jax.models import preset

  steps = preset("quick").train.num_steps
  if config.train.num_steps != steps:
    return []
  return [
    f"Runs of {steps} steps are a tour: too short to learn anything that a router could be good at. Use --preset=default "
    "for a comparison."
  ]


# Shown in the report.
NOTES = [
  "Balancing losses are 1 x weight in each layer at perfect balance, and layers add up, as in Switch (2101.03961).",
  "loss_free_bias on sigmoid_topk with the step 0.001 is the method as published (2408.15664). Its baseline is "
  "none@sigmoid_topk. On softmax, the paper uses the proportional rule; it does not say how it scales the violation, "
  "and here it is divided by the mean load.",
  "hash_topk, dense and dense_total are yardsticks: experts fixed by the token, one network of the active width, and "
  "one of the width of all experts.",
]

if __name__ == "__main__":
  cli.run(distributed.on_every_process(main))
