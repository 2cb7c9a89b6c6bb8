"""Is it worth more to make a trained dense model sparse, to train it on, or to start a sparse one from scratch?

Question   Bits per byte against further steps at equal compute, and where the curves cross.
Command    python experiments/upcycle.py --seeds=5
           python experiments/upcycle.py --preset=tiny --seeds=2 --dense_steps=60 --num_steps=60 --output_dir=runs/upcycle_tiny
Hardware   two CPU cores, 4 GB; any JAX device
Minutes    not measured at the default length; a few for the second command, on two CPU cores
Result     see docs/adapt.md

First trains a dense model for `--dense_steps` with each seed. Then every arm is trained for `--num_steps` on the same
batches:

- continued: the dense model, unchanged;
- upcycled: its feed-forward parts cut in two and copied, `--num_experts` experts of half the width, 2 per token, so a
  token meets the same width as before (2212.05055; 2410.07524 for the cut). Begins at the loss of the dense model;
- upcycled_half_new: half of each expert's hidden units are drawn anew (2407.10671, Qwen2);
- scratch: the same sparse model with random parameters.

The batches begin anew with the first one of the seed. So the arms read what the dense model has read, as far as it came: all but scratch
read it a second time, and scratch reads it once. The curves are of repeated text.

All arms compute the same per token, except for the router. The learning rate warms up again and then is constant,
so that every point of a curve is the result of a training of that length. Writes a comparison's folder, and beside it
dense/ and start/ with the models, and curves.csv. The same command continues where it was. What was made of the dense models
stays what it is, so other --dense_steps need another folder.
"""

import csv
import pathlib
import shlex
import sys

from absl import flags

from moe_jax import cli, disk
from moe_jax.cluster import start as distributed
from moe_jax.comparison import flags as comparison_flags

_DENSE_STEPS = flags.DEFINE_integer("dense_steps", 600, "steps of the dense model before that", lower_bound=1)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", "runs/upcycle", "the folder to write")
_SAID_HERE = (
  "ffn",
  "num_experts_per_token",
  "expert_dim",
  "num_shared_experts",
  "experts",
  "schedule",
  "init_from",
)
_SAID_HERE += ("balancers", "eval_every")
flags.DEFINE_string("balancers", "switch_loss:0.01", "of the sparse arms; several are joined by +")
flags.DEFINE_integer("eval_every", 0, "steps between the points of a curve; 0: a tenth of num_steps")
cli.define_flags(leave_out=(*_SAID_HERE, "seed", "data_seed"))
comparison_flags.define_flags(sweep=False, shard=False)
distributed.define_flags()
for module in (cli, comparison_flags, distributed):
  flags.adopt_module_key_flags(module)  # shown by --help

UPCYCLED = {"upcycled": {}, "upcycled_half_new": {"reinit": 0.5}}


def main(argv: list[str]) -> None:
  del argv
  # Imported here, so that --help and wrong flags answer at once.
  from moe_jax.adapt import check_upcycle
  from moe_jax.comparison.arms import with_arm
  from moe_jax.comparison.comparison import Comparison
  from moe_jax.errors import InputError
  from moe_jax.nn.build import resolve

  config = cli.config_from_flags()
  folder = pathlib.Path(_OUTPUT_DIR.value)
  steps = config.train.num_steps
  every = flags.FLAGS.eval_every or max(steps // 10, 1)
  config = with_arm(config, {"schedule": "constant", "eval_every": every, "balancers": "none"})
  dense = {"ffn": "mlp"}
  sparse = {
    "ffn": "moe",
    "num_experts_per_token": 2,
    "expert_dim": config.model.dense_dim // 2,
    "experts": config.model.activation,
    "balancers": flags.FLAGS.balancers,
  }
  moe = with_arm(config, sparse).model.moe
  check_upcycle(resolve(with_arm(config, dense).model), moe)  # before the dense models are trained
  before = with_arm(config, {"num_steps": _DENSE_STEPS.value, "eval_every": 0})
  arguments = comparison_flags.arguments()
  dense_comparison = Comparison({"dense": dense}, config=before, output_dir=folder / "dense", **arguments)
  check_starts(folder, arguments["seeds"])
  for result in dense_comparison.run():
    if "diverged" in result:
      raise InputError(f"{result['diverged']}. Nothing can be made of such a model")
  dense_folder = folder / "dense" / "arms" / "dense"
  make_starts(folder, dense_folder, moe, arguments["seeds"])
  start = lambda arm: {"init_from": str(folder / "start" / arm / "seed_{seed}")}
  arms = {
    "continued": dense | {"init_from": str(dense_folder / "seed_{seed}")},
    **{arm: sparse | start(arm) for arm in UPCYCLED},
    "scratch": sparse,
  }
  comparison = Comparison(arms, config=config, output_dir=folder / "arms_after", **arguments)
  results = comparison.run()
  comparison.report(
    results,
    title="Upcycling",
    question=__doc__.splitlines()[0],
    command=shlex.join(["python", *sys.argv]),
    notes=[
      f"All arms but scratch start from a dense model of {_DENSE_STEPS.value} steps, whose batches they read again from the first one; "
      "scratch reads them once."
    ],
  )
  report_curves(folder, list(arms), list(arguments["seeds"]))


def check_starts(folder: pathlib.Path, seeds) -> None:
  """Raises `InputError` if models are there that were made of a dense one of other steps, before that is trained on."""
  from moe_jax.training.made import is_made

  for arm in UPCYCLED:
    for seed in seeds:
      is_made(folder / "start" / arm / f"seed_{seed}", {"step": _DENSE_STEPS.value})


def make_starts(folder: pathlib.Path, dense: pathlib.Path, moe, seeds) -> None:
  """Writes the upcycled models that are not there yet.

  Raises:
    InputError: if one is there that was made of another dense model.
  """
  from moe_jax.adapt import upcycle
  from moe_jax.training.load import load_run
  from moe_jax.training.made import is_made, source_of
  from moe_jax.training.start import save_model

  for seed in seeds:
    loaded = load_run(dense / f"seed_{seed}")
    source = source_of(loaded.model, loaded.step)
    for arm, options in UPCYCLED.items():
      start = folder / "start" / arm / f"seed_{seed}"
      if not is_made(start, source):
        model = upcycle(loaded.model, moe, seed=seed, **options)
        save_model(start, model, loaded.config, loaded.tokenizer, source=source)


def report_curves(folder: pathlib.Path, arms: list[str], seeds: list[int]) -> None:
  """Writes curves.csv, and prints the means over seeds and where curves cross. What a run has not, such as one that diverged, is empty."""
  import numpy as np

  from moe_jax.training.metric_writer import read_jsonl

  found = {}  # of arm, seed and step
  for arm in arms:
    for seed in seeds:
      for line in read_jsonl(
        folder / "arms_after" / "arms" / arm / f"seed_{seed}" / "metrics.jsonl", skip_damaged=True
      ):
        if "eval_nll" in line:
          found[arm, seed, line["step"]] = line.get("eval_bits_per_byte", line["eval_nll"])
  steps = sorted({step for _, _, step in found})
  point = lambda *key: found.get(key, np.nan)
  curves = {
    arm: np.array([[point(arm, seed, x) for x in steps] for seed in seeds]) for arm in arms
  }  # [seeds, points]
  with disk.whole_text(folder / "curves.csv") as file:
    writer = csv.writer(file)
    writer.writerow(["arm", "seed", *steps])
    rows = [(arm, seed) for arm in arms for seed in seeds]
    writer.writerows([*row, *(found.get((*row, step), "") for step in steps)] for row in rows)
  print(f"\nmean over {len(seeds)} seeds, bits per byte (nats per token without text), after steps:")
  print(f"{'':<20}" + "".join(f"{step:>9}" for step in steps))
  for arm in arms:
    means = curves[arm].mean(axis=0)
    print(f"{arm:<20}" + "".join(f"{'-':>9}" if np.isnan(x) else f"{x:9.4f}" for x in means))
  for arm in UPCYCLED:
    for other in ("continued", "scratch"):
      print(f"{other} against {arm}: {crossing(steps, curves[arm], curves[other])}")


def crossing(steps: list[int], own, other) -> str:
  """Says from which evaluation on `other` is below `own` in the mean over seeds, and in how many seeds at the last one.

  Only evaluations that all seeds of both have count, and which ones are left out is said.
  """
  import numpy as np

  whole = ~np.isnan(own + other).any(axis=0)
  if not whole.any():
    return "no evaluation that all seeds have"
  left_out = ", ".join(f"step {step}" for step in np.array(steps)[~whole])
  lacks = left_out and f"; of {len(steps)} evaluations, those that a run lacks are left out: {left_out}"
  steps, own, other = np.array(steps)[whole], own[:, whole], other[:, whole]
  below = other.mean(axis=0) < own.mean(axis=0)
  seeds = f"{int((other[:, -1] < own[:, -1]).sum())} of {len(own)} seeds at step {steps[-1]}"
  if not below[-1]:
    return f"higher at step {steps[-1]}; lower in {seeds}{lacks}"
  first = next(i for i in range(len(below)) if below[i:].all())
  return f"lower from step {steps[first]} on; lower in {seeds}{lacks}"


if __name__ == "__main__":
  cli.run(distributed.on_one_process(main))
