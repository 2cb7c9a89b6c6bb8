"""Which router gives the lowest loss at equal active compute?

Question   Perplexity, load and drops of every router: same model but for the routing, same batches, equal active width
           K x F (except top_p, remoe, expert_threshold, soft_moe and latent_moe, which have no verdict).
Command    python experiments/routers.py
           python experiments/routers.py --routers=all --output_dir=runs/every_router
           python experiments/routers.py --routers=softmax_topk,sigmoid_topk:normalize=true@loss_free_bias:0.001
           python experiments/routers.py --objective=masked_lm --output_dir=runs/masked_routers
Hardware   two CPU cores, 2 GB; any JAX device
Minutes    a minute or two a run on two CPU cores: about 20 for the default. Most runs of the table of all routers in
           docs/comparisons.md are from one H200
Result     see docs/comparisons.md

An arm is a router. Its own balancers follow @. Of the names in moe_jax/comparison/arms.py, some bring their own; all
other arms use --balancers. The report says which arm has which. Routers that look at later tokens
leak them to the model. Their perplexity cannot be reached when text is generated, so they get no verdict against the
others. With --objective=masked_lm the model is bidirectional: every position may see all others, and such routers
compare fairly with token choice. Writes the same folder as load_balancing.py, and resumes in the same way.
"""

import shlex
import sys

from absl import flags

from moe_jax import cli
from moe_jax.cluster import start as distributed
from moe_jax.comparison import flags as comparison_flags

ROUTERS = {
  True: "softmax_topk,switch_top1,hash_topk,dense",  # in a causal model
  False: "softmax_topk,softmax_topk:softmax=before,batch_prioritized,expert_choice,sinkhorn,base_assignment,soft_moe,dense",
}

_ROUTERS = flags.DEFINE_string(
  "routers",
  "",
  "all, or arms separated by commas: a name in moe_jax/comparison/arms.py, which may bring its own balancers, or "
  "ROUTER[@BALANCERS]; empty: "
  f"{ROUTERS[True]}, and with --objective=masked_lm {ROUTERS[False]}",
)
_BALANCERS = flags.DEFINE_string(
  "balancers", "switch_loss:0.01", "of the arms that bring none; several are joined by +"
)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", "runs/routers", "the folder to write")
cli.define_flags(leave_out=("router", "balancers", "seed", "data_seed"))
comparison_flags.define_flags()
distributed.define_flags()
for module in (cli, comparison_flags, distributed):
  flags.adopt_module_key_flags(module)  # shown by --help


def main(argv: list[str]) -> None:
  del argv
  # Imported here so that --help and invalid flags respond immediately.
  from moe_jax.comparison.arms import routers, routing_arm
  from moe_jax.comparison.comparison import Comparison
  from moe_jax.comparison.fitting import fitting_arms
  from moe_jax.training.compiled import resolve_config

  config = cli.config_from_flags()
  with_balancers = lambda arm: {"balancers": _BALANCERS.value} | arm
  every = {name: with_balancers(arm) for name, arm in routers(config.model.moe).items()}
  parse = lambda text: with_balancers(routing_arm(text))
  causal = resolve_config(config).model.causal
  comparison = Comparison(
    arms=fitting_arms("routers", _ROUTERS.value or ROUTERS[causal], every, parse, config),
    config=config,
    output_dir=_OUTPUT_DIR.value,
    **comparison_flags.arguments(),
  )
  results = comparison.run()
  comparison.report(
    results,
    title="Routers",
    question="Which router gives the lowest loss at equal active compute?",
    command=shlex.join(["python", *sys.argv]),
    notes=[WIDTH, LEAKS if causal else MASKED, EVALUATION],
    states=["balancers"],
  )


WIDTH = (
  "K x F, the hidden width that a token sees, is equal in all arms that have a verdict. It differs for remoe, "
  "expert_threshold, soft_moe, latent_moe, and top_p unless K is what that may choose at most. Routers that choose one "
  "expert have wider ones, of K x F, and so more parameters. "
  "task_level reads the domain of each sequence, and task_level and sequence_level drop nothing."
)
LEAKS = (
  "Routers that look at later tokens of the sequence (expert choice, batch priority, BASE, Sinkhorn, ...) have no "
  "verdict against the others: their perplexity uses what a language model must predict."
)
MASKED = (
  "Perplexity is that of masked tokens, of which the model sees both sides. Routers that look at a whole sequence "
  "leak nothing here, so they compare with the others. With --group_size=0, a routing group is one sequence."
)
EVALUATION = (
  "In evaluation nothing is drawn but the masks, which are the same in all arms, and a capacity is "
  "--eval_capacity_factor; base_assignment and sinkhorn take each token's best experts."
)

if __name__ == "__main__":
  cli.run(distributed.on_every_process(main))
