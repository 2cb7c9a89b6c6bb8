"""What should be trained when a sparse model is tuned on little data, and how?

Question   Loss on held-out examples of every way to tune one model, paired by seed.
Command    python experiments/finetune_arms.py --model=runs/load_balancing/arms/switch_loss_0.01/seed_{seed} --seeds=5
           python experiments/finetune_arms.py --model=MODEL --arms=all,all_but_experts,experts --sequence_length=256 --pack_examples
           python experiments/finetune_arms.py --model=MODEL --dataset=text_folder --text_folder=FOLDER
Hardware   two CPU cores, 4 GB for a small model; any JAX device
Minutes    those of num_steps, for every arm and seed
Result     see docs/adapt.md

MODEL is the folder of a run, with {seed} where each seed has its own. By default it is tuned on instructions from the standard library
(--dataset=stdlib_tasks), with the loss on the responses. Arms:

- all: everything is trained, the baseline;
- all_but_experts, experts, ffn, attention, router: a part is (ST-MoE, 2202.08906, section 4.2);
- adapters: low-rank ones on all parts that have matrices;
- expert_dropout: all, with 0.4 of the hidden units of experts dropped, and nothing else;
- dropout_0.1: all, with 0.1 of them dropped, and 0.1 of what attention and experts add to the residual stream;
- dropout_0.1_experts_0.4: the same with 0.4 in experts (Switch, 2101.03961, section 2.4);
- balanced, not_balanced: all, with switch_loss:0.01, and without a balancing loss;
- dropping: all, with a capacity of 1 per expert and group (ST-MoE, table 5: dropping hardly matters);
- small_batch: all, with a quarter of the batch and four times the steps, so that as much text is read (ST-MoE);
- large_rate: all, with three times the learning rate; small_batch_large_rate: both.

Writes a comparison's folder, which scripts/render_tables.py stores. Results have a digest of the parameters that they started from. The
same command continues where it was.
"""

import dataclasses
import pathlib
import shlex
import sys
from collections.abc import Sequence

from absl import flags

from moe_jax import cli
from moe_jax.cluster import start as distributed
from moe_jax.comparison import flags as comparison_flags
from moe_jax.config import ModelConfig, MoEConfig

_MODEL = flags.DEFINE_string(
  "model", None, "the folder of the run to tune, with {seed} if there are several", required=True
)
_ARMS = flags.DEFINE_list(
  "arms", ["all_arms"], "names of arms, the first the baseline; all_arms: all of them"
)
_RANK = flags.DEFINE_integer("adapter_rank", 8, "rank of low-rank adapters", lower_bound=1)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", "runs/finetune_arms", "the folder to write")
_OF_MODEL = {field.name for cls in (ModelConfig, MoEConfig) for field in dataclasses.fields(cls)}
_SAID_HERE = ("tokenizer", "objective", "init_from", "trained", "seed", "data_seed")
cli.define_flags(leave_out=(*_OF_MODEL, *_SAID_HERE))
comparison_flags.define_flags()
distributed.define_flags()
for module in (cli, comparison_flags, distributed):
  flags.adopt_module_key_flags(module)  # shown by --help

PARTS = ("all", "all_but_experts", "experts", "ffn", "attention", "router")
FIELDS = {
  **{part: {"trained": part} for part in PARTS},
  "balanced": {"balancers": "switch_loss:0.01"},
  "not_balanced": {"balancers": "none"},
  "dropping": {"dispatcher": "sorted", "capacity_factor": 1.0, "eval_capacity_factor": 2.0},
}
ADDED = (
  "adapters",
  "expert_dropout",
  "dropout_0.1",
  "dropout_0.1_experts_0.4",
)  # whose model has more than the run's
# The fields in which such a model may differ.
CHANGED = (
  "experts",
  "shared_experts",
  "mixer",
  "ffn",
  "residual",
  "num_layers",
  "num_dense_first",
  "moe_every",
  "segments",
)
SMALLER, LARGER = 4, 3  # the batch is divided by the one, and the learning rate multiplied by the other
PACES = ("small_batch", "large_rate", "small_batch_large_rate")
ARMS = (*FIELDS, *ADDED, *PACES)


def main(argv: list[str]) -> None:
  del argv
  # Imported here, so that --help and wrong flags answer at once.
  from moe_jax.comparison.comparison import Comparison
  from moe_jax.data.text_folder import check_outside
  from moe_jax.errors import InputError, unknown_name
  from moe_jax.training.load import check_finished, load_run

  names = ARMS if _ARMS.value == ["all_arms"] else tuple(_ARMS.value)
  if not names or len(set(names)) < len(names):
    raise InputError(f"--arms={','.join(names)}: must be different arms, e.g. {','.join(ARMS[:2])}")
  for name in names:
    if name not in ARMS:
      raise unknown_name("arm", name, ARMS)
  arguments = comparison_flags.arguments()
  if len(arguments["seeds"]) > 1:  # a mean of shorter and longer runs says nothing
    for seed in arguments["seeds"]:
      check_finished(folder_of(seed))
  folder, loaded = pathlib.Path(_OUTPUT_DIR.value), load_run(folder_of(arguments["seeds"][0]))
  config = configured(loaded)
  check_outside(folder, config.data)  # before the models are written that arms start from
  comparison = Comparison(
    {name: arm(folder, name, config, arguments["seeds"]) for name in names},
    config=config,
    output_dir=folder / "tuned",
    **arguments,
  )
  results = comparison.run()
  comparison.report(
    results,
    title="Fine-tuning",
    question=__doc__.splitlines()[0],
    command=shlex.join(["python", *sys.argv]),
    notes=[f"All arms start from {_MODEL.value}."],
    varies=varies(names),
  )


def varies(names: Sequence[str]) -> list[str]:
  """Returns what arms of these names differ in by design. Which parameters are trained is a field of the optimizer."""
  has_small = any(name.startswith("small_batch") for name in names)
  steps = ["num_steps", "tokens_per_step"] if has_small else []
  return ["schedule", *(["slots"] if "dropping" in names else []), *steps]


def pace(name: str, config) -> dict:
  """Returns the fields of an arm that reads the same text in other batches, or learns at another rate.

  Raises:
    InputError: if the batch has no quarter.
  """
  from moe_jax.errors import InputError

  fields, batch = {}, config.data.batch_size
  if "small_batch" in name:
    if batch % SMALLER:
      raise InputError(f"--batch_size={batch}: must be a multiple of {SMALLER} for the arm {name}")
    train = config.train
    # All that is counted in steps or batches stays the same part of the text.
    counts = {field: SMALLER * getattr(train, field) for field in ("num_steps", "eval_every", "eval_batches")}
    counts["warmup_steps"] = SMALLER * config.optimizer.warmup_steps
    fields |= {"batch_size": batch // SMALLER, "tail_fraction": train.tail_fraction / SMALLER, **counts}
  if "large_rate" in name:
    fields["learning_rate"] = LARGER * config.optimizer.learning_rate
  return fields


def folder_of(seed: int) -> pathlib.Path:
  return pathlib.Path(_MODEL.value.replace("{seed}", str(seed)))


def configured(loaded):
  """Returns the configuration of the flags, with the model and the tokenizer of the run.

  Raises:
    InputError: if the data set would be cut with another tokenizer, or has responses and the model sees later tokens.
  """
  from moe_jax.data import load_dataset
  from moe_jax.data.prompts import PromptDataset
  from moe_jax.errors import InputError
  from moe_jax.training.load import tokenizer_name
  from moe_jax.training.tuning import objective_for

  config, tokenizer = cli.config_from_flags({"dataset": "stdlib_tasks"}), tokenizer_name(loaded)
  data = dataclasses.replace(config.data, tokenizer=tokenizer)
  dataset = load_dataset(data)
  objective = objective_for(loaded.config, isinstance(dataset, PromptDataset), f"--model={_MODEL.value}")
  train = dataclasses.replace(config.train, objective=objective, init_from=_MODEL.value)
  if dataset.tokenizer and loaded.tokenizer and dataset.tokenizer.fingerprint != loaded.tokenizer.fingerprint:
    raise InputError(f"--model={_MODEL.value}: has another tokenizer than {tokenizer}")
  return dataclasses.replace(config, model=loaded.config.model, data=data, train=train)


def arm(folder: pathlib.Path, name: str, config, seeds) -> dict:
  """Returns the fields of an arm. Writes the models that it starts from, if they have more than the run's.

  Raises:
    InputError: if one is there that was made of another model.
  """
  from moe_jax.comparison.arms import value_of
  from moe_jax.training.load import load_run
  from moe_jax.training.made import is_made, source_of
  from moe_jax.training.start import save_model

  if name in FIELDS:
    return FIELDS[name]
  if name in PACES:
    return pace(name, config)
  rank = {"adapter_rank": _RANK.value} if name == "adapters" else {}
  for seed in seeds:
    start, loaded = folder / "start" / name / f"seed_{seed}", load_run(folder_of(seed))
    source, model = source_of(loaded.model, loaded.step, **rank), with_more(loaded.model, name, seed)
    if not is_made(start, source):
      save_model(start, model, loaded.config, loaded.tokenizer, source=source)
  made = dataclasses.replace(config, model=model.config)
  own = {
    field: value_of(made, field) for field in CHANGED if value_of(made, field) != value_of(config, field)
  }
  own["init_from"] = str(folder / "start" / name / "seed_{seed}")
  return own | ({"trained": "adapters"} if name == "adapters" else {})


def with_more(model, name: str, seed: int):
  """Returns the model that an arm of `ADDED` starts from."""
  from moe_jax import adapt

  if name == "adapters":
    return adapt.add_adapters(model, _RANK.value, seed=seed)
  model = adapt.wrap_experts(model, f"expert_dropout:rate={0.1 if name == 'dropout_0.1' else 0.4}")
  return model if name == "expert_dropout" else adapt.set_dropout(model, 0.1)


if __name__ == "__main__":
  cli.run(distributed.on_one_process(main))
