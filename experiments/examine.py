"""What do the routers of a trained model do with a text?

Question   For each layer: load, MaxVio, dead and overloaded experts, what an expert tells of domain, token and
           position, which experts go together, how many devices a token reaches, and what a capacity would drop.
Command    python experiments/examine.py --model=runs/load_balancing/arms/none/seed_0
           python experiments/examine.py --model=path/to/hf_folder --dataset=text_folder --text_folder=my_texts
           python experiments/examine.py --model=path/to/hf_folder --stream --dtype=bfloat16 --eval_batches=4
Hardware   two CPU cores; memory for the model, or for its largest layer with --stream. Any JAX device
Minutes    under 1 for the default model on two CPU cores, more with --replay
Result     report.html in the folder, see docs/examine.md

The model is a run of this package or a checkpoint in Hugging Face's form. Without --dataset the text is that of the run;
it is cut with the tokenizer of the model. --replay also lets every balancer with a bias act on the recorded router
logits, as experiments/replay.py does: what it would have done to these choices, without training.

Writes layers.csv, experts.csv (which tokens an expert takes), examination.npz with all sums, replays.csv, pictures, and
one page with all of it, report.html.
"""

import pathlib
import shlex
import sys
from typing import Any

from absl import flags

from moe_jax import cli
from moe_jax.errors import InputError
from moe_jax.inference import flags as model_flags

_DEVICES = flags.DEFINE_integer(
  "devices", 4, "over which the experts of a layer would be spread, equally many on each", lower_bound=1
)
_REPLAY = flags.DEFINE_string(
  "replay", "none", "balancers to replay on the router logits, separated by commas; all; none"
)
_STREAM = flags.DEFINE_bool(
  "stream",
  False,
  "keep one layer of a published checkpoint in memory at a time, and the activations of all batches",
)
_OUTPUT_DIR = flags.DEFINE_string(
  "output_dir", "", "the folder to write; empty: runs/examine/NAME OF THE MODEL"
)
model_flags.define_flags()
model_flags.define_data_flags(batch_size=16, eval_batches=64)
flags.adopt_module_key_flags(model_flags)  # shown by --help


def main(argv: list[str]) -> None:
  del argv
  # Imported here, so that --help and wrong flags answer at once.
  import contextlib

  from rich.console import Console

  from moe_jax import locks
  from moe_jax.analysis.examine import replays, report
  from moe_jax.analysis.examine.examination import examine
  from moe_jax.data.text_folder import check_outside

  console, methods = Console(), _methods()
  opened = model_flags.open_stream() if _STREAM.value else model_flags.open_model()
  with contextlib.ExitStack() as stack:  # the folder is this command's own until the report is there
    with opened as loaded:
      folder = _output_dir(loaded.folder)
      check_outside(folder, model_flags.data_config(loaded))
      stack.enter_context(locks.hold(folder / locks.LOCK, f"--output_dir={folder}"))
      dataset = model_flags.open_dataset(loaded)
      batches = list(dataset.validation_batches(flags.FLAGS.batch_size, limit=flags.FLAGS.eval_batches))
      recording = contextlib.nullcontext()
      if _REPLAY.value != "none":
        if not replays.can_record(loaded.config):
          raise InputError(
            f"--replay={_REPLAY.value}: the layers of this model differ, so nothing can be replayed on all"
          )
        recording = replays.recording(folder / "router_logits", loaded.config, batches)
      for old in folder.glob("router_logits/*"):
        old.unlink()  # of an earlier examination
      with recording as see:
        found = examine(loaded.model, batches, dataset.info.domains, _DEVICES.value, see)
    report.print_layers(found, console)
    page = report.write(
      folder,
      found,
      title=f"{loaded.folder.name or loaded.folder}, examined",
      command=shlex.join(["python", *sys.argv]),
      facts=_facts(loaded, dataset),
      text_of=_text_of(loaded),
      replays=replays.replay_all(folder / "router_logits", methods, len(found.load_E(0))) if see else (),
    )
  console.print(f"report: {page}", soft_wrap=True, markup=False, highlight=False)


def _methods() -> list[str]:
  """Returns the balancers to replay; none for all of them."""
  from moe_jax.nn.build import naming
  from moe_jax.ops.balancing import make_balancer

  names = [name.strip() for name in _REPLAY.value.split(",") if name.strip() and name.strip() != "all"]
  for name in names:
    with naming("replay", name):
      make_balancer(name)
  return names


def _output_dir(model: pathlib.Path) -> pathlib.Path:
  """Returns a new folder, or one that an examination has written."""
  from moe_jax.analysis.examine import report

  # Of a run in a comparison, the arm and the seed name it.
  name = "-".join(part for part in model.resolve().parts[-2:] if part != "arms")
  folder = pathlib.Path(_OUTPUT_DIR.value or f"runs/examine/{name}").expanduser()
  report.check_folder(folder)
  return folder


def _facts(loaded: Any, dataset: Any) -> dict[str, str]:
  from moe_jax.training.results import versions

  return {
    "Model": str(loaded.folder),
    "Text": f"{dataset.info.name}, validation, fingerprint {dataset.info.fingerprint[:12]}",
    "Window": f"{dataset.config.sequence_length} tokens",
    "Versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
  }


def _text_of(loaded: Any) -> Any:
  import numpy as np

  if loaded.tokenizer is None:
    return str
  return lambda token: loaded.tokenizer.decode(np.array([token]))


if __name__ == "__main__":
  cli.run(main)
