"""How soon does a configuration reach a fixed validation loss, with balanced experts, on two CPU cores?

Question   Seconds and tokens to a number of bits per byte, as a ratio to a reference that runs in the same minutes.
Command    python experiments/speedrun.py --name=muon --optimizer=muon --output_dir=runs/speedrun_muon
           python experiments/speedrun.py --name=reference            # the reference against itself
           python experiments/speedrun.py --table                     # the table of docs/LEADERBOARD.md
Hardware   two CPU cores, 2 GB
Minutes    about 30 for five seeds on two CPU cores
Result     see docs/LEADERBOARD.md, which also has the rules

An attempt is the reference with the fields that flags change (--preset=NAME starts from another preset). With each seed,
the reference trains first and then the attempt, each until an evaluation finds the target and MaxVio within its bound, or
until its --num_steps. Seconds are those of training steps: compilation, evaluation and saving are not counted.

Writes OUTPUT_DIR/attempt.json, and one folder for each seed. If it is interrupted, run it again with the same flags:
finished seeds are kept, and a seed with one finished run starts over; what it had is moved to its folder `damaged`.
"""

import datetime
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys
from typing import Any

from absl import flags

from moe_jax import cli, disk
from moe_jax.config import Config
from moe_jax.errors import InputError
from moe_jax.models import PRESETS

ROOT = pathlib.Path(__file__).resolve().parents[1]
ENTRIES = ROOT / "docs/results/leaderboard"

# The reference reaches the target at about half of its schedule. A change of one of these numbers or of the reference
# starts a new table.
TARGET_BITS_PER_BYTE = 2.3
MAX_ACTIVE_PARAMS = 400_000
MAX_VIO = 0.3
EVALUATE_BYTES = 150_000
NUM_CORES = 2
NUM_SEEDS = 5
TEXT = "7f0d9e2099f0"  # begins the fingerprint of the reference's text: the standard library of Python 3.12.1

# Every field, so that it stays what it is when a default changes.
REFERENCE: dict[str, Any] = {
  "model": {
    **{"num_layers": 3, "model_dim": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "dense_dim": 192},
    **{"activation": "swiglu", "num_dense_first": 0, "moe_every": 1, "mixer": "attention", "ffn": "moe"},
    **{
      "residual": "pre_norm",
      "rope_theta": 10_000.0,
      "norm_eps": 1e-6,
      "qk_norm": False,
      "tie_embeddings": False,
    },
    **{
      "init_scale": 1.0,
      "compute_dtype": "float32",
      "scan_layers": True,
      "remat": "full",
      "dense_ffn": "mlp",
    },
    **{"causal": True, "segments": [], "mtp_depth": 0},
    "moe": {
      **{"num_experts": 16, "num_experts_per_token": 2, "expert_dim": 64, "num_shared_experts": 0},
      **{
        "experts": "swiglu",
        "router": "sigmoid_topk",
        "balancers": "loss_free_bias:0.003",
        "dispatcher": "dropless",
      },
      **{
        "capacity_factor": 1.25,
        "eval_capacity_factor": 2.0,
        "group_size": 0,
        "accept_leaks": "",
        "jitter": 0.0,
        "shared_expert_gate": False,
        "shared_expert_dim": 0,
        "shared_experts": "mlp",
      },
    },
  },
  "optimizer": {
    **{
      "optimizer": "adamw",
      "trained": "all",
      "learning_rate": 3e-3,
      "schedule": "cosine",
      "warmup_steps": 50,
    },
    **{
      "final_learning_rate_fraction": 0.1,
      "weight_decay": 0.1,
      "beta1": 0.9,
      "beta2": 0.95,
      "clip_norm": 1.0,
    },
  },
  "data": {
    **{
      "dataset": "stdlib",
      "data_dir": "",
      "text_folder": "",
      "held_out_tasks": "",
      "pack_examples": False,
      "tokenizer": "bpe:2048",
      "sequence_length": 128,
    },
    **{"batch_size": 16, "data_seed": 0, "markov_domains": 4, "markov_states": 64, "markov_temperature": 1.0},
  },
  "train": {
    **{
      "objective": "next_token",
      "hooks": "",
      "num_steps": 600,
      "accumulation": 1,
      "seed": 0,
      "log_every": 10,
    },
    **{"eval_every": 0, "eval_batches": 0, "checkpoint_every": 0, "tail_fraction": 0.2, "tensorboard": False},
    **{
      "checkpoint_minutes": 5.0,
      "max_minutes": 0.0,
      "ignore_memory_check": False,
      "init_from": "",
      "record_router_logits": 0,
      "router_logits_dtype": "float16",
    },
  },
  "mesh": {"slice": 1, "data": 1, "fsdp": 1, "expert": 1, "tensor": 1},
}
PRESETS["reference"] = Config.from_dict(REFERENCE)

_NAME = flags.DEFINE_string("name", "", "of the attempt, in the table; letters, digits, spaces and _.+-")
_TARGET = flags.DEFINE_float("target_bits_per_byte", TARGET_BITS_PER_BYTE, "over the validation split")
_ACTIVE = flags.DEFINE_integer("max_active_params", MAX_ACTIVE_PARAMS, "that one token may use")
_MAX_VIO = flags.DEFINE_float(
  "max_vio", MAX_VIO, "largest MaxVio over the validation split, mean over layers with E > K"
)
_SEEDS = flags.DEFINE_integer("seeds", NUM_SEEDS, "pairs of runs, with seeds 0, 1, ...", lower_bound=1)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", "runs/speedrun", "the folder to write")
_TABLE = flags.DEFINE_bool(
  "table", False, f"print the table of {ENTRIES.relative_to(ROOT)} and train nothing"
)
_FIXED = ("seed", "data_seed", "eval_every", "eval_batches", "checkpoint_every", "tensorboard")
cli.define_flags(leave_out=(*_FIXED, "record_router_logits", "router_logits_dtype"))
flags.FLAGS.set_default("preset", "reference")
flags.adopt_module_key_flags(cli)  # shown by --help


def main(argv: list[str]) -> None:
  del argv
  if _TABLE.value:
    print(leaderboard())
    return
  if not re.fullmatch(r"[\w.+-][\w .+-]*", _NAME.value):
    raise InputError(
      f"--name={_NAME.value}: name the attempt with letters, digits, spaces and _.+-, e.g. --name=muon"
    )
  about = {"name": _NAME.value, "commit": _commit()}
  machine = _machine()
  # Imported here, so that --help and wrong flags answer at once, and after the process is held to its cores.
  from moe_jax.analysis.leaderboard import HEADER, row
  from moe_jax.analysis.speedrun import Rules, Speedrun

  rules = Rules(_TARGET.value, _ACTIVE.value, _MAX_VIO.value, EVALUATE_BYTES)
  attempt = cli.config_from_flags()
  speedrun = Speedrun(attempt, PRESETS["reference"], rules, _OUTPUT_DIR.value, about, machine)
  entry = speedrun.run(range(_SEEDS.value))
  entry |= {"date": datetime.date.today().isoformat(), "command": shlex.join(["python", *sys.argv])}
  disk.write_json(pathlib.Path(_OUTPUT_DIR.value) / "attempt.json", entry)
  for pair in entry["seeds"]:
    for arm in ("reference", "attempt"):
      if not pair[arm]["reached"]:
        numbers = f"{pair[arm]['bits_per_byte']:.3f} bits per byte, MaxVio {pair[arm]['max_vio']:.2f}"
        print(
          f"{arm} seed {pair['seed']}: not at the target after {pair[arm]['num_steps']} steps ({numbers})"
        )
  print("\n".join([HEADER, row(entry)]))


def leaderboard() -> str:
  """Returns the table of the committed entries."""
  from moe_jax.analysis.leaderboard import read_entries, table

  return table(read_entries(ENTRIES, what_is_wrong))


def what_is_wrong(entry: dict[str, Any]) -> str:
  """Returns why an entry cannot be in the table; empty if it can."""
  from moe_jax.analysis.leaderboard import contradiction
  from moe_jax.analysis.speedrun import learned_before

  rules = {
    "target_bits_per_byte": TARGET_BITS_PER_BYTE,
    "max_active_params": MAX_ACTIVE_PARAMS,
    "max_vio": MAX_VIO,
    "evaluate_bytes": EVALUATE_BYTES,
  }
  if entry["rules"] != rules:
    return f"was run with other rules ({entry['rules']}); run it with the present ones"
  if not _agrees(_placeless(entry["reference"]), _placeless(PRESETS["reference"].to_dict())):
    return "was run beside another reference; run it beside the present one"
  if (seeds := [pair["seed"] for pair in entry["seeds"]]) != list(range(NUM_SEEDS)):
    return f"has the seeds {', '.join(map(str, seeds))}; run it with --seeds={NUM_SEEDS}"
  if entry["attempt"]["data"]["dataset"] != "stdlib":
    return f"was trained on {entry['attempt']['data']['dataset']}; leave out --dataset"
  if not (text := entry.get("fingerprint", TEXT)).startswith(TEXT):  # entries of before do not say it
    return f"was run on other text (fingerprint {text[:12]}, not {TEXT}); run it on that of the table"
  if learned := learned_before(entry["attempt"]):
    return f"was run with {learned}, so others trained it, too; leave that out"
  if cores := {pair["machine"]["cores"] for pair in entry["seeds"]} - {NUM_CORES}:
    return f"was run on {min(cores)} cores; run it on {NUM_CORES}"
  if entry["commit"].endswith(CHANGED):
    return "was run on code that is not committed; commit it, and the files of --plugins, and run it again"
  return contradiction(entry)


def _placeless(config: dict[str, Any]) -> dict[str, Any]:
  """Returns a configuration without the place of its text."""
  from moe_jax.training.changes import FREE

  return config | {"data": {name: x for name, x in config["data"].items() if name not in FREE["data"]}}


def _agrees(old: Any, new: Any) -> bool:
  """Returns whether `new` is `old`, but for fields that later versions have added."""
  if isinstance(old, dict) and isinstance(new, dict):
    return all(key in new and _agrees(old[key], new[key]) for key in old)
  return old == new


CHANGED = " with changes"


def _commit() -> str:
  """Returns the commit of the code, and whether tracked files, or what was imported of an attempt, differ from it."""
  git = lambda *arguments: subprocess.run(
    ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
  ).stdout.strip()
  try:
    tracked = {ROOT / name for name in git("ls-files", "-z").split("\0")}
    is_changed = git("status", "--porcelain", "--untracked-files=no") or not _own_files() <= tracked
    return git("rev-parse", "HEAD") + (CHANGED if is_changed else "")
  except (OSError, subprocess.CalledProcessError):
    return f"unknown{CHANGED}"


def _own_files() -> set[pathlib.Path]:
  """Returns the files of `--plugins`, of moe_jax, and of whatever else was imported from the repository."""
  found = set()
  for name, module in list(sys.modules.items()):
    path = pathlib.Path(getattr(module, "__file__", None) or sys.executable).resolve()
    is_plugin = name in flags.FLAGS.plugins or name.startswith("moe_jax_plugin_")
    is_here = path.is_relative_to(ROOT) and path.suffix == ".py" and "site-packages" not in path.parts
    if is_plugin or is_here or name.partition(".")[0] == "moe_jax":
      found.add(path)
  return found


def _machine() -> dict[str, Any]:
  """Holds the process to its cores where the system can, and returns what it runs on. Call it before JAX starts."""
  cores = os.cpu_count()
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:NUM_CORES])
    cores = len(os.sched_getaffinity(0))
  processor = platform.processor() or platform.machine()
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    processor = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), processor)
  except OSError:  # only Linux says
    pass
  return {"processor": processor, "cores": cores}


if __name__ == "__main__":
  cli.run(main)
