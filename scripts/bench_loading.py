r"""Compares loading a checkpoint with Hugging Face transformers: seconds, in new processes that take turns.

  taskset -c 0 python scripts/bench_loading.py
  taskset -c 0 python scripts/bench_loading.py --gigabytes=0.2 --repeats=3

The checkpoint is a Mixtral-like model with random weights in a temporary folder: one file, one tensor per expert, in
float32 as in bfloat16 (--dtype), and loaded in that type. A process imports its library first, which is not timed, and reads the
file once, so that it is in the machine's memory for both. What is timed is `moe_jax.load(folder)` until all parameters
are there, and `from_pretrained(folder)` and a look at every page of every parameter, because it may map the file and read
it later. On a busy machine, seconds of the processor count.
Needs the extra `parity`.
"""

import pathlib
import statistics
import subprocess
import sys
import tempfile

from absl import flags

from moe_jax import cli

_GIGABYTES = flags.DEFINE_float("gigabytes", 2.0, "size of the checkpoint, 10^9 bytes", lower_bound=0.01)
_DTYPE = flags.DEFINE_enum(
  "dtype", "float32", ["float32", "bfloat16"], "type of the weights, and of the parameters"
)
_REPEATS = flags.DEFINE_integer("repeats", 5, "timed runs of each", lower_bound=1)

_OURS = """
import sys, time
folder, dtype = sys.argv[1:]
import jax, moe_jax, moe_jax.interop.load, numpy as np
from flax import nnx
jax.block_until_ready(jax.numpy.zeros(1))
{warm}
start, cpu = time.perf_counter(), time.process_time()
loaded = moe_jax.load(folder, dtype=dtype)
values = [np.asarray(x) for x in jax.tree.leaves(nnx.state(loaded.model, nnx.Param))]
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
print(seconds, cpu, sum(x.size for x in values), jax.__version__)
"""
_THEIRS = """
import sys, time
folder, dtype = sys.argv[1:]
import torch, transformers
from transformers import MixtralForCausalLM
torch.set_num_threads(1)
transformers.logging.disable_progress_bar()
{warm}
start, cpu = time.perf_counter(), time.process_time()
model = MixtralForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
{touch}
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
print(seconds, cpu, sum(x.numel() for x in model.parameters()), transformers.__version__)
"""
_WARM = "for path in __import__('pathlib').Path(folder).glob('*.safetensors'): path.read_bytes()"
_TOUCH = "for x in model.parameters(): x.view(-1)[::512].sum()"  # a number of every page of 4 kB, or of 2 kB


def make_checkpoint(folder: pathlib.Path, gigabytes: float, dtype: str) -> None:
  """Saves a model with 16 experts in each of 4 layers, D = 1,024, whose experts' width makes the size."""
  import torch
  import transformers

  width = round(gigabytes * 1e9 / (4 if dtype == "float32" else 2) / (4 * 16 * 3 * 1024) / 8) * 8
  config = transformers.MixtralConfig(
    num_hidden_layers=4, hidden_size=1024, intermediate_size=max(width, 8), num_local_experts=16, num_experts_per_tok=2,
    num_attention_heads=8, num_key_value_heads=2, head_dim=128, vocab_size=1024,
  )  # fmt: skip
  model = transformers.MixtralForCausalLM(config).to(getattr(torch, dtype))
  model.save_pretrained(folder)


def main(argv: list[str]) -> None:
  del argv
  from moe_jax.errors import InputError

  try:
    import transformers  # noqa: F401
  except ImportError as error:
    raise InputError(f"needs {error.name}, run: pip install -e '.[parity]'") from None
  programs = {"moe_jax": _OURS.replace("{warm}", _WARM)}
  programs["transformers"] = _THEIRS.replace("{warm}", _WARM).replace("{touch}", _TOUCH)
  with tempfile.TemporaryDirectory() as folder:
    make_checkpoint(pathlib.Path(folder), _GIGABYTES.value, _DTYPE.value)
    size = sum(path.stat().st_size for path in pathlib.Path(folder).glob("*.safetensors"))
    seconds = {name: [] for name in programs}  # of the clock, and of the processor
    for _ in range(_REPEATS.value):
      said = {}
      for name, program in programs.items():
        command = [sys.executable, "-c", program, folder, _DTYPE.value]
        clock, processor, *said[name] = subprocess.run(
          command, check=True, stdout=subprocess.PIPE, text=True
        ).stdout.split()
        seconds[name].append((float(clock), float(processor)))
      if len({count for count, _ in said.values()}) > 1:
        print(f"error: the two have different numbers of parameters: {said}", file=sys.stderr)
        sys.exit(1)
      print(", ".join(f"{name} {of_one[-1][0]:.2f} s" for name, of_one in seconds.items()), flush=True)
  ours, theirs = ([statistics.median(kind) for kind in zip(*of_one)] for of_one in seconds.values())
  versions = f"JAX {said['moe_jax'][1]}, transformers {said['transformers'][1]}"
  print(f"{size / 1e9:.2f} GB in {_DTYPE.value}, medians of {_REPEATS.value} ({versions})")
  for i, kind in enumerate(("clock", "processor")):
    ratio = theirs[i] / ours[i]
    print(f"  {kind}: moe_jax {ours[i]:.2f} s, transformers {theirs[i]:.2f} s: {ratio:.2f} times as fast")


if __name__ == "__main__":
  cli.run(main)
