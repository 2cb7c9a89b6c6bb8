"""How few experts can a trained model do with, and is it better to prune or to merge them?

Question   Bits per byte by domain against the number of experts left, for all methods from one model.
Command    python experiments/compress.py --model=runs/load_balancing/arms/none/seed_0 --experts=8,4,2
           python experiments/compress.py --model=MODEL --methods=usage --domain=code --output_dir=runs/compress_code
           python experiments/compress.py --model=runs/load_balancing/arms/none/seed_{seed} --seeds=5
Hardware   two CPU cores, 4 GB for a small model; any JAX device
Minutes    about 2 for a model of the default preset
Result     see docs/adapt.md

MODEL is the folder of a run, of an adapted model, or of a published checkpoint. `--calibration` batches of training text say
what the experts do; the validation text is not read before the end. Without training between, and in one shot:

- random: the baseline of pruning, with a seed;
- usage: the most used experts stay;
- probability: those with the highest mean probability of the router;
- output_norm: those whose output, weighted by the router, is largest (REAP, 2510.13999);
- loss: those whose loss costs most on the calibration text;
- merge_average, merge_usage: the others join the most similar leader (M-SMoE, 2310.01334), aligned, router kept;
- merge_unaligned: merge_usage without the Hungarian match;
- merge_router: merge_usage with the router's columns merged, too;
- task_level: no expert is dropped, but a token takes the K experts with the highest mean probability on its domain (2110.03742);
  of a domain without training text, as held-out tasks, on all training text.

With `--domain`, the experts that stay are those that this domain uses: the part of the model for one task, whose loss inside
and outside of the domain the table shows (task-level extraction, 2110.03742). Writes compress.csv with a row for each method and
number, and prints it. With --seeds, {seed} in --model names a model for each, and the folder gets the report of a comparison, paired by
seed. The same command continues where it was.
"""

import pathlib
import shlex
import sys

from absl import flags

from moe_jax import cli
from moe_jax.cluster import start as distributed

_MODEL = flags.DEFINE_string(
  "model", None, "the folder of the model, with {seed} if there are several", required=True
)
_SEEDS = flags.DEFINE_integer("seeds", 1, "models, with seeds 0, 1, ...", lower_bound=1)
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


TASK_LEVEL = "task_level"


def main(argv: list[str]) -> None:
  del argv
  # Imported here, so that --help and wrong flags answer at once.
  from moe_jax.adapt.compress import METHODS
  from moe_jax.adapt.table import write_table
  from moe_jax.analysis.measured import Measured, models_of
  from moe_jax.errors import InputError, unknown_name

  known = (*METHODS, TASK_LEVEL)
  methods = known if _METHODS.value == ["all"] else tuple(_METHODS.value)
  for name in methods:
    if name not in known:
      raise unknown_name("method", name, known)
  for text in _EXPERTS.value:
    if not text.isdecimal():
      raise InputError(f"--experts={text}: must be numbers of experts, joined by commas")
  for flag, given in (("experts", [str(int(n)) for n in _EXPERTS.value]), ("methods", methods)):
    if len(set(given)) < len(given):
      raise InputError(f"--{flag}={','.join(given)}: one of them is named twice")
  folders, folder = models_of(_MODEL.value, _SEEDS.value), pathlib.Path(_OUTPUT_DIR.value)
  names = ("model", "calibration", "domain", "batches", "text_folder")
  measured = Measured(folder, {name: flags.FLAGS[name].value for name in names})
  rows = [row for seed, path in enumerate(folders) for row in rows_of(measured, seed, path, methods)]
  write_table(folder / "compress.csv", rows)
  if len(folders) > 1:
    measured.report(
      title="Fewer experts",
      question=__doc__.splitlines()[0],
      command=shlex.join(["python", *sys.argv]),
      notes=["In one shot, without training. An arm is a method and the number of experts left."],
    )


def rows_of(measured, seed: int, path: str, methods) -> list[dict]:
  """Measures one model and all that is made of it."""
  from moe_jax.adapt.compress import Compressor
  from moe_jax.adapt.experts import check_number
  from moe_jax.adapt.layers import moe_layers, take_apart
  from moe_jax.adapt.table import calibration_batches, row, text_of
  from moe_jax.inference.evaluate import evaluate, predicts_responses
  from moe_jax.interop.load import load

  loaded = load(path)
  parts = take_apart(loaded.model)
  e = parts.layers[moe_layers(parts)[0]].block.moe.num_experts
  numbers = [int(n) for n in _EXPERTS.value] or sorted({e * 3 // 4, e // 2, e // 4} - {0}, reverse=True)
  for number in numbers:  # before anything is measured
    check_number(parts.layers, moe_layers(parts), number, "--experts")
  dataset = text_of(loaded, _TEXT_FOLDER.value)
  limits, responses = (dataset.config.batch_size, _BATCHES.value), predicts_responses(loaded.config)
  batches = calibration_batches(dataset, _CALIBRATION.value, _DOMAIN.value)
  compressed = Compressor(loaded.model, batches)
  rows = []

  def add(arm: str, method: str, number: int, make) -> None:
    def measure():
      with cli.said(f"{arm}, seed {seed}"):
        model = make()
        return model, evaluate(model, dataset, *limits, responses=responses), {}

    found = measured(arm, seed, loaded, dataset, measure)
    rows.append({"seed": seed} | row(method, number, found.scores))

  add("whole", "whole", e, lambda: loaded.model)
  if TASK_LEVEL in methods:
    k = parts.layers[moe_layers(parts)[0]].block.moe.num_experts_per_token
    add(TASK_LEVEL, TASK_LEVEL, k, lambda: task_level(loaded.model, dataset))
  for name in methods:
    for number in numbers if name != TASK_LEVEL else ():
      add(f"{name}_{number}", name, number, lambda name=name, number=number: compressed(name, number))
  return rows


def task_level(model, dataset):
  """Returns the model with routers that read the domain of the text. One that is not trained gets the experts of all text."""
  from moe_jax import adapt, disk
  from moe_jax.adapt.table import calibration_batches, has_training_text

  of = lambda domain: adapt.calibrate(model, calibration_batches(dataset, _CALIBRATION.value, domain))
  domains = dataset.info.domains
  without = [domain for domain in domains if not has_training_text(dataset, domain)]
  if without:
    disk.note(f"{TASK_LEVEL}: no training text of {', '.join(without)}, which get the experts of all text")
  found = dict.fromkeys(without, of("")) if without else {}
  return adapt.to_task_level(model, [found.get(domain) or of(domain) for domain in domains])


if __name__ == "__main__":
  cli.run(distributed.on_one_process(main))
