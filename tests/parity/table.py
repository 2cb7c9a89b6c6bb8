"""Prints the table of docs/checkpoints.md: how far whole models are from transformers.

python -m tests.parity.table
"""

import pathlib
import tempfile

import numpy as np

import moe_jax
from tests.parity import models
from tests.parity.test_checkpoints import CASES, change_config


def main():
  print("| tiny model of | logits | gradients | expert choices that differ |")
  print("| --- | --- | --- | --- |")
  for name, (prefix, fields) in CASES.items():
    with tempfile.TemporaryDirectory() as folder:
      model = models.build(prefix, **fields)
      model.save_pretrained(folder)
      if name == "kimi_k2":
        change_config(pathlib.Path(folder), model_type=name)
      theirs, ours = models.theirs(model), models.ours(moe_jax.load(folder))
    buffers = {name for name, _ in model.named_buffers()}
    shared = theirs.gradients.keys() - buffers
    gradients = max(distance(ours.gradients[key], theirs.gradients[key]) for key in shared)
    differ = sum((a != b).any(axis=-1).sum() for a, b in zip(ours.selected, theirs.selected, strict=True))
    logits = distance(ours.logits_BLV, theirs.logits_BLV)
    print(f"| `{name}` | {logits:.1e} | {gradients:.1e} | {differ} of {sum(map(len, ours.selected))} |")


def distance(ours, theirs):
  """The largest difference, relative to the largest value."""
  return np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30)


if __name__ == "__main__":
  main()
