"""How few experts can a trained model do with, and is it better to prune or to merge them?

Question   Bits per byte by domain against the number of experts left, for all methods from one model.
Command    python experiments/compress.py --model=runs/load_balancing/arms/none/seed_0 --experts=8,4,2
           python experiments/compress.py --model=MODEL --methods=usage --domain=code --output_dir=runs/compress_code
Hardware   two CPU cores, 4 GB for a small model; any JAX device
Minutes    about 2 for a model of the default preset
Result     see docs/adapt.md

MODEL is the folder of a run, of an adapted model, or of a published checkpoint. `--calibration` batches of training text say
what the experts do; the validation text is not read before the end. Without training between, and in one shot:

- random: the baseline of pruning, with a seed;
- usage: the most used experts stay;
- output_norm: those whose output, weighted by the router, is largest (REAP, 2510.13999);
- loss: those whose loss costs most on the calibration text;
- merge_average, merge_usage: the others join the most similar leader (M-SMoE, 2310.01334), aligned, router kept;
- merge_unaligned: merge_usage without the Hungarian match;
- merge_router: merge_usage with the router's columns merged, too.

With `--domain`, the experts that stay are those that this domain uses: the part of the model for one task, whose loss inside
and outside of the domain the table shows (task-level extraction, 2110.03742). Writes compress.csv with a row for each method and number, and prints it.
"""

import pathlib

from absl import flags

from moe_jax import cli
from moe_jax.cluster import start as distributed

_MODEL = flags.DEFINE_string("model", None, "the folder of the model", required=True)
_EXPERTS = flags.DEFINE_list("experts", [], "numbers of experts left; empty: three quarters, half, a quarter")
_METHODS = flags.DEFINE_list("methods", ["all"], "all, or names of methods")
_CALIBRATION = flags.DEFINE_integer(
  "calibration", 16, "batches of training text for calibration", lower_bound=1
)
_DOMAIN = flags.DEFINE_string(
  "domain", "", "calibrate on this domain only: what is left is the part that it uses"
)
_BATCHES = flags.DEFINE_integer("batches", 0, "batches of validation text; 0: all", lower_bound=0)
_TEXT_FOLDER = flags.DEFINE_string(
  "text_folder", "", "other text than the model's own: its sub-folders are the domains"
)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", "runs/compress", "the folder to write")
flags.DEFINE_list("plugins", [], "Python files or modules that register methods of your own")
distributed.define_flags()
flags.adopt_module_key_flags(distributed)


def main(argv: list[str]) -> None:
  del argv
  # Imported here, so that --help and wrong flags answer at once.
  from moe_jax.adapt.compress import METHODS, Compressor
  from moe_jax.adapt.layers import moe_layers, take_apart
  from moe_jax.adapt.table import calibration_batches, row, text_of, write_table
  from moe_jax.errors import unknown_name
  from moe_jax.inference.evaluate import evaluate
  from moe_jax.interop.load import load

  methods = METHODS if _METHODS.value == ["all"] else tuple(_METHODS.value)
  for name in methods:
    if name not in METHODS:
      raise unknown_name("method", name, METHODS)
  loaded = load(_MODEL.value)
  parts = take_apart(loaded.model)
  e = parts.layers[moe_layers(parts)[0]].block.moe.num_experts
  numbers = [int(n) for n in _EXPERTS.value] or [e * 3 // 4, e // 2, e // 4]
  dataset = text_of(loaded, _TEXT_FOLDER.value)
  batches = calibration_batches(dataset, _CALIBRATION.value, _DOMAIN.value)
  measure = lambda model: evaluate(model, dataset, dataset.config.batch_size, _BATCHES.value)
  rows = [row("whole", e, measure(loaded.model))]
  compressed = Compressor(loaded.model, batches)
  for name in methods:
    for number in numbers:
      with cli.said(f"{name}, {number} experts"):
        rows.append(row(name, number, measure(compressed(name, number))))
  write_table(pathlib.Path(_OUTPUT_DIR.value) / "compress.csv", rows)


if __name__ == "__main__":
  cli.run(distributed.on_every_process(main))
