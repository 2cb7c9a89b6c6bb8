"""How much of what a sparse model gains over a dense one does a dense student keep?

Question   The share of the gain that is kept, for the arms of Switch's table (2101.03961, table 6).
Command    python experiments/distil.py --model=runs/load_balancing/arms/none/seed_0 --seeds=5
           python experiments/distil.py --model=MODEL --student_experts=8 --output_dir=runs/distil_sparse
           python experiments/distil.py --model=MODEL --seeds=1 --num_steps=60 --output_dir=runs/distil_tiny
Hardware   two CPU cores, 4 GB for a small model; any JAX device
Minutes    about 3 per run of 600 steps, on two CPU cores
Result     see docs/adapt.md

The teacher is the sparse model in the folder of a run. The student is dense, with the same attention, and feed-forward parts of
the width that a token meets in the teacher: K x F, and that of shared experts. With --student_experts=N it is sparse: the teacher
with the N experts of each layer that it uses most. A teacher that was tuned on responses has students that are trained and measured
on them, too. Arms, all trained for --num_steps:

- alone: from random parameters, on the text;
- soft: half of the loss are the teacher's predictions;
- init: all parameters of the teacher but those of its experts (a sparse student has those of its own, too), trained on the text;
- init_soft: both;
- init_mixed: with 0.75 of the loss on the text and 0.25 on the predictions.

kept = (loss of alone - loss of the arm) / (loss of alone - loss of the teacher), in nats per target of the validation text.
Switch has 3 % for soft, 20 % for init_soft and 29 % for init_mixed. Writes a comparison's folder and kept.csv, and resumes.
"""

import dataclasses
import pathlib
import shlex
import sys

from absl import flags

from moe_jax import cli, disk
from moe_jax.cluster import start as distributed
from moe_jax.comparison import flags as comparison_flags
from moe_jax.config import ModelConfig, MoEConfig

_MODEL = flags.DEFINE_string("model", None, "the folder of the run that is the teacher", required=True)
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "of the soft targets")
_STUDENT = flags.DEFINE_integer(
  "student_experts", 0, "experts in each layer of a sparse student; 0: it is dense", lower_bound=0
)
_CALIBRATION = flags.DEFINE_integer(
  "calibration", 16, "batches of training text that say which experts are used", lower_bound=1
)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", "runs/distil", "the folder to write")
_OF_MODEL = {field.name for cls in (ModelConfig, MoEConfig) for field in dataclasses.fields(cls)}
_OF_TEXT = (
  "dataset",
  "text_folder",
  "data_dir",
  "held_out_tasks",
  "pack_examples",
  "tokenizer",
  "sequence_length",
)  # the teacher's
cli.define_flags(leave_out=(*_OF_MODEL, *_OF_TEXT, "objective", "init_from", "seed", "data_seed"))
comparison_flags.define_flags(sweep=False, shard=False)
distributed.define_flags()
for module in (cli, comparison_flags, distributed):
  flags.adopt_module_key_flags(module)  # shown by --help


def main(argv: list[str]) -> None:
  del argv
  # Imported here, so that --help and wrong flags answer at once.
  from moe_jax.adapt.table import write_table
  from moe_jax.comparison.comparison import Comparison
  from moe_jax.data.loading import text_of_run
  from moe_jax.data.text_folder import check_outside
  from moe_jax.training.compiled import resolve_config
  from moe_jax.training.load import load_run, tokenizer_name
  from moe_jax.training.made import is_made, source_of
  from moe_jax.training.start import save_model
  from moe_jax.training.tuning import check_causal
  from moe_jax.training.validate import validate

  folder, config = pathlib.Path(_OUTPUT_DIR.value), cli.config_from_flags()
  disk.check_folder(folder)
  teacher, start = load_run(_MODEL.value), folder / "start"
  check_causal(
    teacher.config, f"--model={_MODEL.value}", "so it predicts no next token; choose a causal teacher"
  )
  making = {"student_experts": _STUDENT.value}
  making |= {"calibration": _CALIBRATION.value} if _STUDENT.value else {}
  source = source_of(teacher.model, teacher.step, **making)
  check_outside(folder, teacher.config.data)
  has_start = is_made(start, source)
  student = student_of(teacher)
  data = dataclasses.replace(teacher.config.data, batch_size=config.data.batch_size)
  if not data.bpe_size:  # one that was trained on the text comes with the text
    data = dataclasses.replace(data, tokenizer=tokenizer_name(teacher))
  dataset = text_of_run(teacher.folder, data, None)
  objective, soft_objective = objectives(teacher.config, dataset)
  train = dataclasses.replace(config.train, objective=objective)
  config = dataclasses.replace(config, model=student.config, data=data, train=train)
  if not has_start:
    save_model(start, student, config, teacher.tokenizer, source=source)
  soft = lambda share: {
    "objective": f"{soft_objective}:teacher={_MODEL.value}:temperature={_TEMPERATURE.value}:soft={share}"
  }
  init = {"init_from": str(start)}
  arms = {
    "alone": {},
    "soft": soft(0.5),
    "init": init,
    "init_soft": init | soft(0.5),
    "init_mixed": init | soft(0.25),
  }
  comparison = Comparison(arms, config=config, output_dir=folder / "students", **comparison_flags.arguments())
  results = comparison.run()
  measured = dataclasses.replace(config, model=teacher.config.model)
  whole = validate(teacher.model, resolve_config(measured), dataset)
  rows = kept(results, whole["nll"])
  comparison.report(
    [with_kept(*pair) for pair in zip(results, rows, strict=True)],
    title="Distillation",
    question=__doc__.splitlines()[0],
    command=shlex.join(["python", *sys.argv]),
    notes=[f"The teacher is {_MODEL.value}, one model for all seeds. {of_batches(teacher.config)}"],
    varies=["objective"],
  )
  write_table(folder / "kept.csv", rows)


def objectives(config, dataset) -> tuple[str, str]:
  """Returns what students are trained with alone, and with soft targets: that by which the teacher is measured.

  Raises:
    InputError: if the teacher was trained on responses, and the data set has none.
  """
  from moe_jax.data.prompts import PromptDataset
  from moe_jax.errors import InputError
  from moe_jax.inference.evaluate import predicts_responses

  if not predicts_responses(config):
    return "next_token", "distil"
  if not isinstance(dataset, PromptDataset):
    raise InputError(
      f"--model={_MODEL.value}: was trained on responses, and its text ({dataset.info.name}) has none; choose a model of "
      "--dataset=stdlib_tasks, or one that was trained on text"
    )
  return "response", "distil_response"


def of_batches(config) -> str:
  """Returns a sentence that says which students read the training text in the order in which the teacher of `config` did."""
  seed, students = config.data.data_seed, comparison_flags.arguments()["seeds"]
  if seed not in students:
    return "It saw the training text in another order than every student."
  others = ", the others in other orders" if len(students) > 1 else ""
  return f"The student of seed {seed} sees the training text in the order in which the teacher did{others}."


def student_of(teacher):
  """Returns the student with what it takes from the teacher: a dense one, or one with fewer experts."""
  from moe_jax.adapt import to_dense
  from moe_jax.adapt.compress import Compressor
  from moe_jax.adapt.table import calibration_batches, text_of

  if _STUDENT.value:
    batches = calibration_batches(text_of(teacher), _CALIBRATION.value)
    return Compressor(teacher.model, batches)("usage", _STUDENT.value)
  return to_dense(teacher.model, dense_width(teacher.config.model))


def dense_width(model) -> int:
  """Returns the one width of a dense student: the hidden units of experts, shared ones too, that a token meets in a layer.

  Raises:
    InputError: if layers have different widths, for which a dense model has no place.
  """
  from moe_jax.errors import InputError
  from moe_jax.nn.build import different_blocks, routed_part

  own = {block: routed_part(block) is not None for block in different_blocks(model)}
  routed = [block.moe for block, is_routed in own.items() if is_routed]
  widths = {moe.num_experts_per_token * moe.expert_dim + moe.shared_width for moe in routed}
  widths |= set() if all(own.values()) else {model.dense_dim}
  if len(widths) > 1:
    raise InputError(
      f"--model={_MODEL.value}: a token meets layers of {' and '.join(map(str, sorted(widths)))} hidden units, and a dense student "
      "has one width; choose a sparse student (--student_experts=N), or a teacher whose dense layers are as wide as what a token "
      "meets in its experts"
    )
  return widths.pop() if widths else 0


def kept(results: list[dict], teacher: float) -> list[dict]:
  """Returns a row for each result, with the share of the gain that its arm keeps."""
  from moe_jax.comparison.statistics import number

  nll = {(result["arm"], result["seed"]): number(result["validation"]["nll"]) for result in results}
  rows = []
  for (arm, seed), own in nll.items():
    alone = nll["alone", seed]
    rows.append(
      {"arm": arm, "seed": seed, "nll": own, "teacher": teacher, "kept": (alone - own) / (alone - teacher)}
    )
  return rows


def with_kept(result: dict, row: dict) -> dict:
  """Returns a result with the share of the gain as a column of the table."""
  column = {"key": "kept", "title": "Kept", "unit": "of the gain", "format": ".3f", "lower_is_better": False}
  column |= {"part": "validation", "name": "kept", "of_experts": False}
  validation = result["validation"] | {"kept": row["kept"]}
  return result | {"validation": validation, "columns": [*result.get("columns", ()), column]}


if __name__ == "__main__":
  cli.run(distributed.on_one_process(main))
