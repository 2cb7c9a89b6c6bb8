"""Does a sparse model gain more from instruction tuning than a dense one, and does it need the auxiliary loss for that?

Question   The fall of the loss by tuning, of a sparse model minus that of a dense one, paired by seed (2305.14705).
Command    python experiments/instruct.py --dense=runs/load_balancing/arms/dense/seed_{seed} --sparse=runs/load_balancing/arms/switch_loss_0.01/seed_{seed} --seeds=5 --sequence_length=256 --pack_examples
           python experiments/instruct.py --dense=DENSE --sparse=SPARSE --held_out_tasks=summary --learning_rate=0.001
Hardware   two CPU cores, 4 GB for a small model; any JAX device
Minutes    those of num_steps, for three arms and every seed
Result     see docs/adapt.md

DENSE and SPARSE are folders of runs on the same text, for as many steps, with {seed} where each seed has its own. Both are tuned on the
instructions of --dataset=stdlib_tasks, on the same batches, with the loss on the responses. Arms:

- dense: the baseline;
- sparse_balanced: with the auxiliary loss of --balancers;
- sparse_not_balanced: without one.

A gain is the loss before minus the loss after tuning, in nats per token of responses: on held-out examples of the tasks that are
trained, and on the tasks of --held_out_tasks, of which no example is. Differences are an arm's gain minus that of the dense model.
Writes a comparison's folder, which scripts/render_tables.py stores, and gains.csv with the losses of every seed. The same command
continues where it was.
"""

import dataclasses
import pathlib
import shlex
import sys

from absl import flags

from moe_jax import cli
from moe_jax.cluster import start as distributed
from moe_jax.comparison import flags as comparison_flags
from moe_jax.config import ModelConfig, MoEConfig

DENSE, SPARSE = "dense", "sparse"
_FOLDERS = {
  kind: flags.DEFINE_string(
    kind, None, f"the folder of the {kind} run, with {{seed}} if there are several", required=True
  )
  for kind in (DENSE, SPARSE)
}
_OUTPUT_DIR = flags.DEFINE_string("output_dir", "runs/instruct", "the folder to write")
flags.DEFINE_string("balancers", "switch_loss:0.01", "of sparse_balanced; several are joined by +")
flags.DEFINE_string("held_out_tasks", "name,reorder", "tasks that are not trained, joined by commas")
_OF_MODEL = {field.name for cls in (ModelConfig, MoEConfig) for field in dataclasses.fields(cls)}
_SAID_HERE = ("tokenizer", "objective", "init_from", "seed", "data_seed", "dataset", "held_out_tasks")
cli.define_flags(leave_out=(*_OF_MODEL, *_SAID_HERE, "text_folder"))
comparison_flags.define_flags(sweep=False, shard=False)
distributed.define_flags()
for module in (cli, comparison_flags, distributed):
  flags.adopt_module_key_flags(module)  # shown by --help

SAME = (
  "dataset",
  "sequence_length",
  "tokenizer",
  "batch_size",
)  # of the text that both models were trained on
COLUMNS = {"gain": "Gain", "gain_held_out": "Gain, held-out tasks", "nll_before": "NLL before"}
GAINS = {"gain": "trained", "gain_held_out": "held_out"}  # of which tasks


def main(argv: list[str]) -> None:
  del argv
  # Imported here, so that --help and wrong flags answer at once.
  from moe_jax.adapt.table import write_table
  from moe_jax.comparison.comparison import Comparison
  from moe_jax.data import load_dataset

  folder, arguments = pathlib.Path(_OUTPUT_DIR.value), comparison_flags.arguments()
  check_folders(arguments["seeds"])
  check_alike(arguments["seeds"])
  config, arms = plan(arguments["seeds"][0])
  comparison = Comparison(arms, config=config, output_dir=folder / "tuned", **arguments)
  gains = Gains(folder, config, load_dataset(config.data), comparison)
  results = comparison.run()
  results = [result if "diverged" in result else with_gain(result, gains(result)) for result in results]
  comparison.report(
    results,
    title="Instruction tuning",
    question=__doc__.splitlines()[0],
    command=shlex.join(["python", *sys.argv]),
    notes=[f"The models are those of {_FOLDERS[DENSE].value} and {_FOLDERS[SPARSE].value}."],
  )
  rows = [{"arm": r["arm"], "seed": r["seed"]} | r["gains"] for r in results if "gains" in r]
  if rows:
    write_table(folder / "gains.csv", rows)


def folder_of(kind: str, seed: int) -> pathlib.Path:
  return pathlib.Path(_FOLDERS[kind].value.replace("{seed}", str(seed)))


def check_folders(seeds) -> None:
  """Raises `InputError` if the run of a seed is missing, before any is tuned."""
  from moe_jax import disk
  from moe_jax.errors import InputError

  for folder in (folder_of(kind, seed) for kind in _FOLDERS for seed in seeds):
    if not disk.read_object(folder / "config.json"):
      raise InputError(f"{folder}: holds no run (config.json is missing or not whole)")


def plan(seed: int):
  """Returns the configuration of the flags with the dense model, and the arms.

  Raises:
    InputError: if the models were not trained alike, or are not what the flags say.
  """
  from moe_jax.comparison.arms import value_of
  from moe_jax.errors import InputError
  from moe_jax.nn.build import different_blocks, routed_part
  from moe_jax.training.load import load_run, tokenizer_name
  from moe_jax.training.tuning import check_causal

  loaded = {kind: load_run(folder_of(kind, seed)) for kind in _FOLDERS}
  for kind, run in loaded.items():
    check_causal(
      run.config, f"--{kind}={_FOLDERS[kind].value}", "so it writes no responses; choose a causal model"
    )
    parts = [routed_part(block) for block in different_blocks(run.config.model)]
    # The arm `dense` of a comparison is one expert that all tokens get.
    if any(part is not None and part.num_experts > 1 for part in parts) != (kind == SPARSE):
      raise InputError(
        f"--{kind}={_FOLDERS[kind].value}: has {'no ' if kind == SPARSE else ''}layers with routed experts"
      )
  config = cli.config_from_flags({"dataset": "stdlib_tasks"})
  dense, sparse = (run.config.model for run in loaded.values())
  text = {"held_out_tasks": flags.FLAGS.held_out_tasks, "tokenizer": tokenizer_name(loaded[DENSE])}
  data = dataclasses.replace(config.data, **text)
  train = dataclasses.replace(config.train, objective="response", init_from=_FOLDERS[DENSE].value)
  config = dataclasses.replace(config, model=dense, data=data, train=train)
  other = dataclasses.replace(config, model=sparse)
  names = {field.name for part in (ModelConfig, MoEConfig) for field in dataclasses.fields(part)} - {"moe"}
  differs = {name for name in names if value_of(other, name) != value_of(config, name)}
  fields = {name: value_of(other, name) for name in sorted(differs)} | {"init_from": _FOLDERS[SPARSE].value}
  arms = {
    DENSE: {},
    "sparse_balanced": fields | {"balancers": flags.FLAGS.balancers},
    "sparse_not_balanced": fields | {"balancers": "none"},
  }
  return config, arms


def check_alike(seeds) -> None:
  """Raises `InputError` unless the runs of all seeds are finished, and were trained on the same text for as many steps."""
  from moe_jax import disk
  from moe_jax.errors import InputError
  from moe_jax.training.load import check_finished, load_run

  def of(folder: pathlib.Path) -> dict:
    check_finished(folder)
    run = load_run(folder)
    text = str((disk.read_object(folder / "config.json") or {}).get("fingerprint"))
    found = {name: getattr(run.config.data, name) for name in SAME} | {"steps": run.step, "text": text[:12]}
    return found | {"start": "trained parameters" if run.config.train.init_from else "random parameters"}

  first, *others = [folder_of(kind, seed) for seed in seeds for kind in (DENSE, SPARSE)]
  expected = of(first)
  for folder in others:
    for name, other in of(folder).items():
      if other != expected[name]:
        raise InputError(
          f"{folder}: was not trained as {first} was ({name} {other}, there {expected[name]}), so their gains cannot be "
          "compared"
        )


class Gains:
  """Losses before and after tuning, kept in the folder."""

  def __init__(self, folder: pathlib.Path, config, dataset, comparison):
    from moe_jax.analysis.kept import Kept

    self.config, self.dataset, self.comparison = config, dataset, comparison
    self.held_out = [name for name in config.data.held_out_tasks.split(",") if name]
    settings = {kind: flag.value for kind, flag in _FOLDERS.items()}
    settings |= {"num_steps": config.train.num_steps, "fingerprint": dataset.info.fingerprint}
    self.kept = Kept(folder, settings, config)
    self.check_tasks()

  def check_tasks(self) -> None:
    """Raises `InputError` if no validation example is of a task that is trained, or of one that is not."""
    from moe_jax.errors import InputError

    seen = set()
    for batch in self.dataset.validation_batches(limit=self.config.train.eval_batches):
      seen |= {self.dataset.info.domains[i] for i in batch["domain_B"][batch["mask_BL"].any(axis=1)]}
    for words, known in (("trained", seen - {*self.held_out}), ("held out", seen & {*self.held_out})):
      if not known and (words == "trained" or self.held_out):
        raise InputError(
          f"--sequence_length={self.config.data.sequence_length}: in the validation batches is no example of a task that is "
          f"{words}, because those that are longer are left out; choose a longer one, or more --eval_batches"
        )

  def __call__(self, result: dict) -> dict[str, float]:
    """Returns the mean losses of a result before and after, and their differences.

    Raises:
      InputError: if the loss before is not of the model that was tuned, or the loss after not of the tuned one.
    """
    from moe_jax.errors import InputError

    arm, seed = result["arm"], result["seed"]
    kind = DENSE if arm == DENSE else SPARSE
    tuned = self.comparison.folder.run(arm, seed)
    before = self.kept(f"before/{kind}/seed_{seed}", lambda: self.losses(folder_of(kind, seed)))
    of_run = {"nll": result["validation"]["nll"]}  # tells a run from one that was tuned anew
    after = self.kept(f"after/{arm}/seed_{seed}", lambda: self.losses(tuned) | of_run)
    if after.get("nll", of_run["nll"]) != of_run["nll"]:
      raise InputError(
        f"{tuned}: was tuned anew since its loss was measured; remove {self.kept.folder}/after/{arm}/seed_{seed}.json, and "
        "the same command measures it again"
      )
    if before.get("parameters") != result["init_from"]["digest"]:
      raise InputError(
        f"--{kind}={_FOLDERS[kind].value}: arm {arm} seed {seed} was tuned from another model than the one whose loss before is "
        "measured, so its run has changed since; choose another folder"
      )
    found = {}
    for gain, tasks in GAINS.items():
      if tasks in before:
        losses = {f"{tasks}_before": before[tasks], f"{tasks}_after": after[tasks]}
        found |= losses | {gain: before[tasks] - after[tasks]}
    return found

  def losses(self, folder: pathlib.Path) -> dict[str, float | str]:
    """Returns the loss of a run in nats per token of responses, for tasks that are trained and for those that are not.

    And `parameters`, a digest of them.
    """
    from flax import nnx

    from moe_jax.training.compiled import resolve_config
    from moe_jax.training.digests import tree_digest
    from moe_jax.training.load import load_run
    from moe_jax.training.validate import sums_by_domain

    model = load_run(folder).model
    of_model = resolve_config(dataclasses.replace(self.config, model=model.config))
    sums = sums_by_domain(model, of_model, self.dataset)
    parts = {"trained": [], "held_out": []}
    for task, of_task in sums.items():
      parts["held_out" if task in self.held_out else "trained"].append(of_task)
    total = {name: [sum(x) for x in zip(*found, strict=True)] for name, found in parts.items() if found}
    losses = {name: nll / number for name, (nll, number) in total.items()}
    return losses | {"parameters": tree_digest(nnx.state(model, nnx.Param))}


def with_gain(result: dict, gains: dict[str, float]) -> dict:
  """Returns a result with what was gained as columns of the table."""
  own = gains | {"nll_before": gains["trained_before"]}
  shared = {"unit": "nats/token", "format": ".4f", "part": "validation", "of_experts": False}
  columns = [
    shared
    | {"key": key, "title": title, "name": key, "lower_is_better": key not in GAINS, "judged": key in GAINS}
    for key, title in COLUMNS.items()
    if key in own
  ]
  columns = [*result["columns"], *columns]
  return result | {"validation": result["validation"] | own, "columns": columns, "gains": gains}


if __name__ == "__main__":
  cli.run(distributed.on_one_process(main))
