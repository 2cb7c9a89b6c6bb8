"""Measures how far whole models are from transformers, and stores it for docs/models.md.

python -m tests.parity.table
python scripts/models_table.py  # then writes the page
"""

import json
import pathlib
import tempfile

import moe_jax
from tests.interop.test_published import PUBLISHED
from tests.parity import loop, models
from tests.parity.test_checkpoints import CASES, saved

STORED = pathlib.Path(__file__).parents[2] / "docs/results/parity.json"


def main():
  print("| tiny model of | logits | gradients | expert choices that differ |")
  print("| --- | --- | --- | --- |")
  rows = {}
  for name in [*CASES, "deepseek"]:
    with tempfile.TemporaryDirectory() as folder:
      found = measured(name, pathlib.Path(folder))
    differ = "-" if found.differ is None else f"{found.differ} of {found.choices}"
    print(f"| `{name}` | {found.logits:.1e} | {found.gradients:.1e} | {differ} |")
    presets = [preset for preset, (family, _) in PUBLISHED.items() if case_of(preset, family) == name]
    rows[name] = {"presets": presets} | found._asdict()
  STORED.write_text(json.dumps(rows, indent=1) + "\n")


def measured(name: str, folder: pathlib.Path) -> models.Figures:
  if name == "deepseek":
    return loop.figures(folder)
  model = saved(name, folder)
  theirs, ours = models.theirs(model), models.ours(moe_jax.load(folder))
  return models.figures(model, ours, theirs)


def case_of(preset: str, family: str) -> str:
  """The tiny model that stands for a preset: that of its name, or else that of its family."""
  return preset if preset in CASES else family


if __name__ == "__main__":
  main()
