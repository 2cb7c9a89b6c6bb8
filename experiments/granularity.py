"""How many experts, how large, how many per token, and how many shared?

Question   Bits per byte and MaxVio at equal active width, for other numbers and sizes of experts.
Command    python experiments/granularity.py --seeds=5
           python experiments/granularity.py --preset=tiny --output_dir=runs/granularity_tiny
           python experiments/granularity.py --arms=16x64_top2,64x16_top8 --balancers=loss_free_bias:0.001:rule=proportional
Hardware   two CPU cores, 4 GB; any JAX device
Minutes    not measured at the default length; 128 experts take several times as long as 16 on CPU
Result     see docs/findings.md

An arm is ExF_topK: E experts of width F, of which a token uses K. K x F, the width that a token sees, is that of the
configuration in all arms. Three lines of arms cross in its E, F and K:

- finer experts: E and K grow and F shrinks, so that E x F stays (DeepSeekMoE, 2401.06066; 2402.07871);
- more experts: only E grows, and the number of parameters with it (Switch, 2101.03961, figure 1);
- shared experts: one of the K, or a quarter of the finer ones, takes every token (2401.06066).

All arms have one router, softmax scores without renormalising (2401.06066, eq. 3-5), because with K = 1 renormalised
weights are all 1, and the router would learn nothing from the language-model loss. Writes the same folder as
load_balancing.py, and resumes in the same way.
"""

import shlex
import sys

from absl import flags

from moe_jax import cli
from moe_jax.cluster import start as distributed
from moe_jax.comparison import flags as comparison_flags

_ARMS = flags.DEFINE_string("arms", "all", "all, or names separated by commas, e.g. 16x64_top2,64x16_top8")
_OUTPUT_DIR = flags.DEFINE_string("output_dir", "runs/granularity", "the folder to write")
_SAID_HERE = (
  "num_experts",
  "num_experts_per_token",
  "expert_dim",
  "num_shared_experts",
  "router",
  "balancers",
)
flags.DEFINE_string("balancers", "switch_loss:0.01", "of every arm; several are joined by +")
cli.define_flags(leave_out=(*_SAID_HERE, "seed", "data_seed"))
comparison_flags.define_flags()
distributed.define_flags()
for module in (cli, comparison_flags, distributed):
  flags.adopt_module_key_flags(module)  # shown by --help


def main(argv: list[str]) -> None:
  del argv
  # Imported here, so that --help and wrong flags answer at once.
  from moe_jax.comparison.arms import arms_from_flag, granularity
  from moe_jax.comparison.comparison import Comparison
  from moe_jax.errors import unknown_name

  config = cli.config_from_flags()
  every = granularity(config.model.moe)

  def unknown(name: str) -> None:
    raise unknown_name("arm", name, every)

  arms = arms_from_flag("arms", _ARMS.value, every, unknown)
  comparison = Comparison(
    arms={name: {"router": ROUTER, "balancers": flags.FLAGS.balancers} | arm for name, arm in arms.items()},
    config=config,
    output_dir=_OUTPUT_DIR.value,
    **comparison_flags.arguments(),
  )
  results = comparison.run()
  comparison.report(
    results,
    title="Granularity",
    question="How many experts, how large, how many per token, and how many shared?",
    command=shlex.join(["python", *sys.argv]),
    notes=NOTES,
  )


ROUTER = "softmax_topk:softmax=before"
NOTES = [
  "K x F, the hidden width that a token sees, shared experts included, is equal in all arms. The arms of one E x F have "
  "equal numbers of parameters, but for the router.",
]

if __name__ == "__main__":
  cli.run(distributed.on_every_process(main))
