"""Measures which routers leak later tokens. Prints the table of docs/leaks.md.

  python scripts/leaks.py                                  # every router
  python scripts/leaks.py --routers=softmax_topk,my_router --plugins=my_router.py

The script changes the later tokens of a small causal language model in training mode and prints the largest
change in the logits of earlier tokens, once with a capacity that drops about half of the assignments and once
without drops. It exits with status 1 if a router leaks differently than it declares. All routers take two
minutes on two CPU cores.
"""

import sys

from absl import flags

from moe_jax import cli

_ROUTERS = flags.DEFINE_string("routers", "all", "all, or arms as in experiments/routers.py --routers")
flags.DEFINE_list("plugins", [], "Python files or modules that register routers of your own")

SEEN = 1e-5  # smaller changes are rounding, because sums for earlier tokens are computed differently


def main(argv: list[str]) -> None:
  del argv
  # Imported here so that invalid flags fail immediately.
  from moe_jax.comparison.arms import arms_from_flag, routers, routing_arm, with_arm
  from moe_jax.config import Config
  from moe_jax.nn.build import different_blocks, resolve
  from moe_jax.nn.causality import future_influence
  from moe_jax.nn.leaks import leak

  print("| router | declared | drops half | drops nothing |\n|---|---|---|---|")
  as_declared = True
  for name, arm in arms_from_flag(
    "routers", _ROUTERS.value, routers(Config().model.moe), routing_arm
  ).items():
    model = with_arm(Config(), {**arm, "balancers": "none", "dispatcher": "sorted"}).model
    (block,) = different_blocks(resolve(model))
    with_drops, without = (future_influence(model.moe, ffn=model.ffn, drops=drops) for drops in (True, False))
    found = "always" if without > SEEN else "drops" if with_drops > SEEN else ""
    as_declared &= found == leak(block)
    cells = [f"{x:.3f}" if x > SEEN else "0" for x in (with_drops, without)]
    print(f"| `{name}` | {leak(block) or 'never'} | {cells[0]} | {cells[1]} |", flush=True)
  if not as_declared:
    print("error: a router leaks differently than it declares", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
  cli.run(main)
