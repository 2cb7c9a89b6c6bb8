"""What do experts in few bits cost?

Question   Bytes of experts against bits per byte; how many choices of the router change, by layer; and MaxVio.
Command    python experiments/quantise.py --model=runs/load_balancing/arms/none/seed_0
           python experiments/quantise.py --model=MODEL --formats=int8,int4,int4:32,fp8,mxfp4
           python experiments/quantise.py --model=runs/load_balancing/arms/none/seed_{seed} --seeds=5
Hardware   two CPU cores, 4 GB for a small model; any JAX device
Minutes    about 1 for a model of the default preset
Result     see docs/adapt.md

MODEL is the folder of a run, of an adapted model, or of a published checkpoint. Only matrices of routed experts are stored
in few bits, rounded to nearest: router, attention, norms and embeddings stay. int8 and int4 have a scale per output
channel, or with :GROUP per group of its rows; +aware behind a format lets scales follow a calibration text (AWQ, 2306.00978); fp8 is E4M3 in blocks of 128 x 128; mxfp4 is E2M1 in blocks of 32. A layer
reads the hidden states of its own model, so changed choices add up from layer to layer. Writes quantise.csv, and prints it. With --seeds, {seed} in --model names a
model for each, and the folder gets the report of a comparison, paired by seed. The same command continues where it was.
"""

import pathlib
import shlex
import sys

import numpy as np
from absl import flags

from moe_jax import cli
from moe_jax.cluster import start as distributed

_MODEL = flags.DEFINE_string(
  "model", None, "the folder of the model, with {seed} if there are several", required=True
)
_SEEDS = flags.DEFINE_integer("seeds", 1, "models, with seeds 0, 1, ...", lower_bound=1)
_FORMATS = flags.DEFINE_list(
  "formats",
  ["int8", "int4", "int4+aware", "int4:32", "fp8", "mxfp4"],
  "formats, with :GROUP for integers and +aware",
)
_CALIBRATION = flags.DEFINE_integer(
  "calibration", 4, "batches of training text for formats with +aware", lower_bound=1
)
_BATCHES = flags.DEFINE_integer("batches", 0, "batches of validation text; 0: all", lower_bound=0)
_ROUTES = flags.DEFINE_integer(
  "route_batches", 8, "of these, batches on which choices are compared", lower_bound=1
)
_TEXT_FOLDER = flags.DEFINE_string(
  "text_folder", "", "other text than the model's own: its sub-folders are the domains"
)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", "runs/quantise", "the folder to write")
flags.DEFINE_list("plugins", [], "Python files or modules that register methods of your own")
distributed.define_flags()
flags.adopt_module_key_flags(distributed)


def main(argv: list[str]) -> None:
  del argv
  # Imported here, so that --help and wrong flags answer at once.
  from moe_jax.adapt.quantise import parse_format
  from moe_jax.adapt.table import write_table
  from moe_jax.analysis.measured import Measured, models_of

  formats = {text: parse_format(text) for text in _FORMATS.value}
  folders, folder = models_of(_MODEL.value, _SEEDS.value), pathlib.Path(_OUTPUT_DIR.value)
  names = ("model", "calibration", "batches", "route_batches", "text_folder")
  measured = Measured(folder, {name: flags.FLAGS[name].value for name in names})
  rows = [row for seed, path in enumerate(folders) for row in rows_of(measured, seed, path, formats)]
  write_table(folder / "quantise.csv", rows)
  if len(folders) > 1:
    measured.report(
      title="Experts in few bits",
      question=__doc__.splitlines()[0],
      command=shlex.join(["python", *sys.argv]),
      notes=[
        "Rounded to nearest after training. An arm is a format.",
        f"MaxVio is counted over at most {_ROUTES.value} batches (--route_batches).",
      ],
    )


def rows_of(measured, seed: int, path: str, formats: dict) -> list[dict]:
  """Measures one model in every format."""
  from moe_jax import adapt
  from moe_jax.adapt.routes import changed_routes, max_vio
  from moe_jax.adapt.table import calibration_batches, row, text_of
  from moe_jax.inference.evaluate import evaluate, predicts_responses
  from moe_jax.interop.load import load

  loaded = load(path)
  dataset = text_of(loaded, _TEXT_FOLDER.value)
  limits, responses = (dataset.config.batch_size, _BATCHES.value), predicts_responses(loaded.config)
  limit = min(_ROUTES.value, _BATCHES.value or _ROUTES.value)
  batches = list(dataset.validation_batches(limit=limit))
  whole, rows = loaded.model, []
  calibration = (
    calibration_batches(dataset, _CALIBRATION.value) if any(f.aware for f in formats.values()) else []
  )
  for text, named in {"float32": None, **formats}.items():

    def measure(text=text, named=named):
      with cli.said(f"{text}, seed {seed}"):
        inputs = adapt.expert_inputs(whole, calibration) if named and named.aware else None
        model = adapt.quantise(whole, named.format, named.group, inputs) if named else whole
        others = {
          "bytes": adapt.expert_bytes(model),
          "max_vio": max_vio(model, batches).tolist(),
          "changed": changed_routes(whole, model, batches).tolist(),
        }
        return model, evaluate(model, dataset, *limits, responses=responses), others

    found = measured(text, seed, loaded, dataset, measure)
    rows.append(
      {
        "seed": seed,
        "format": text,
        "bytes": found.others["bytes"],
        "all": row(text, 0, found.scores)["all"],
        "MaxVio": float(np.mean(found.others["max_vio"])),
        **{f"changed {i}": share for i, share in enumerate(found.others["changed"])},
      }
    )
  return rows


if __name__ == "__main__":
  cli.run(distributed.on_one_process(main))
