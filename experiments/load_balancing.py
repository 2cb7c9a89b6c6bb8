"""Does a balancing method balance, and what does it cost in perplexity?

Question   Perplexity beside MaxVio for balancing methods: same model, same batches, several seeds.
Command    python experiments/load_balancing.py
           python experiments/load_balancing.py --methods=none,switch_loss:0.01+z_loss:0.001 --seeds=5
Hardware   two CPU cores, 2 GB; any JAX device
Minutes    about 5 for the default on two CPU cores
Result     MaxVio over the validation set: none > switch_loss > loss_free_bias, see docs/LOG.md

Writes one folder: config.json, metrics.jsonl, summary.csv, plots, report.html, and one folder per arm
and seed under arms/. Run again with the same flags, it keeps the runs that are done and continues the
one that was stopped.
"""

import shlex
import sys

from absl import flags

from moe_jax import cli
from moe_jax.config import Config

DEFAULTS = Config()
METHODS = "none,switch_loss:0.01,loss_free_bias:0.01"

_METHODS = flags.DEFINE_string(
  "methods", METHODS, "arms, comma-separated; an arm joins balancers by +, e.g. switch_loss:0.01+z_loss:0.001"
)
_SEEDS = flags.DEFINE_integer("seeds", 3, "runs per arm, with seeds 0, 1, ...", lower_bound=1)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", "runs/load_balancing", "the folder to write")
cli.define_flags(DEFAULTS, leave_out=("balancers", "seed", "data_seed"))


def main(argv: list[str]) -> None:
  del argv
  # Imported here, so that --help and wrong flags answer at once.
  from moe_jax.comparison import Comparison

  comparison = Comparison(
    arms=[arm.strip() for arm in _METHODS.value.split(",") if arm.strip()],
    seeds=range(_SEEDS.value),
    config=cli.config_from_flags(DEFAULTS),
    output_dir=_OUTPUT_DIR.value,
  )
  results = comparison.run()
  comparison.report(
    results,
    title="Load balancing",
    question="Which method balances the experts, and at what perplexity?",
    command=shlex.join(["python", *sys.argv]),
    notes=NOTES,
  )


NOTES: list[str] = []

if __name__ == "__main__":
  cli.run(main)
