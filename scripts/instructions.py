"""Writes the instructions from the standard library as JSONL, for finetune.py or any other program.

  python scripts/instructions.py --output_dir=instructions --held_out_tasks=name

Writes train.jsonl, validation.jsonl (the same tasks, on other functions), and held_out.jsonl (the tasks that are not trained on). A line
is {"prompt": "...", "response": "...", "task": "..."}. moe_jax/data/stdlib_tasks.py has the tasks.
"""

import pathlib

from absl import flags

from moe_jax import cli

_OUTPUT_DIR = flags.DEFINE_string("output_dir", "instructions", "the folder to write")
_HELD_OUT = flags.DEFINE_list("held_out_tasks", [], "tasks that are not trained on, e.g. name,reorder")


def main(argv: list[str]) -> None:
  del argv
  from moe_jax.data.prompts import write_jsonl
  from moe_jax.data.stdlib_tasks import read_tasks

  splits, held_out, folder = (
    read_tasks(_HELD_OUT.value),
    set(_HELD_OUT.value),
    pathlib.Path(_OUTPUT_DIR.value),
  )
  files = {
    "train": splits["train"],
    "validation": [x for x in splits["validation"] if x.task not in held_out],
    "held_out": [x for x in splits["validation"] if x.task in held_out],
  }
  for name, examples in files.items():
    if examples:
      write_jsonl(folder / f"{name}.jsonl", examples)
      print(f"{folder / name}.jsonl: {len(examples)} examples")


if __name__ == "__main__":
  cli.run(main)
