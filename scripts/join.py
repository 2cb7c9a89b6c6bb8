"""Joins the folders of the shards of a comparison into one folder with one report.

  python experiments/load_balancing.py --shard=1/2 --output_dir=runs/part_1   # on one machine
  python experiments/load_balancing.py --shard=2/2 --output_dir=runs/part_2   # on another
  python scripts/join.py runs/part_1 runs/part_2 --output_dir=runs/joined

The joined folder equals that of one process. Runs that no shard has finished are named; the command of the shards, with
--output_dir=runs/joined and without --shard, trains them.

All is copied into a folder .writing-joined-... beside, which then gets the name. A kill leaves such a folder; remove it.
"""

from absl import flags

from moe_jax import cli
from moe_jax.errors import InputError

_OUTPUT_DIR = flags.DEFINE_string("output_dir", "", "the folder to write, which must be new")


def main(argv: list[str]) -> None:
  # Imported here, so that --help answers at once.
  from rich.console import Console

  from moe_jax.comparison.join import join

  if not _OUTPUT_DIR.value:
    raise InputError("--output_dir=: name a new folder for the joined comparison")
  missing = join(argv[1:], _OUTPUT_DIR.value, Console())
  if missing:
    print(f"missing: {', '.join(missing)}")


if __name__ == "__main__":
  cli.run(main, takes_arguments=True)
