"""Draws bits per byte against MaxVio for every arm of stored tables, and marks those that no other beats in both.

  python scripts/pareto.py  # writes docs/images/pareto.png, of every balancing method and weight
  python scripts/pareto.py --tables=default --output=docs/images/quality_vs_max_vio.png

A table is a folder in docs/results/, as scripts/render_tables.py stores it. Tables in one picture must be of one text, length,
learning rate and size of model, drop tokens alike (docs/fair_comparison.md) and be tuned alike.
"""

import pathlib

from absl import flags

from moe_jax import cli
from moe_jax.errors import InputError

_TABLES = flags.DEFINE_list("tables", ["every_method", "weights"], "names of folders in docs/results/")
_OUTPUT = flags.DEFINE_string("output", "docs/images/pareto.png", "the picture")

ROOT = pathlib.Path(__file__).resolve().parents[1]


def main(argv: list[str]) -> None:
  del argv
  from moe_jax.comparison.report import pareto, read_stored

  output = pathlib.Path(_OUTPUT.value)
  if not _TABLES.value:
    raise InputError("--tables=: name at least one folder in docs/results/")
  if output.suffix != ".png":
    raise InputError(f"--output={output}: must end in .png")
  tables = {name: read_stored(ROOT / "docs" / "results" / name) for name in _TABLES.value}
  print(f"wrote {output}: {pareto.plot_tables(output, tables).caption}")


if __name__ == "__main__":
  cli.run(main)
