"""The Python of README.md runs as it is written, block after block in one process."""

import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from tests.fuzz.commands import Child

ROOT = pathlib.Path(__file__).resolve().parents[1]
# The same programs on less: two steps instead of sixty.
BEFORE = """
import dataclasses
from moe_jax.models import PRESETS
tiny = PRESETS["tiny"]
train = dataclasses.replace(tiny.train, num_steps=2, eval_batches=1, tensorboard=False)
data = dataclasses.replace(tiny.data, sequence_length=16)
PRESETS["tiny"] = dataclasses.replace(tiny, train=train, data=data, mesh=dataclasses.replace(tiny.mesh, data=1))

# a folder to load: random weights, and a tokenizer of single bytes
import moe_jax, tokenizers
from moe_jax.training.compiled import make_model, resolve_config
moe_jax.save(make_model(resolve_config(moe_jax.preset("qwen3_30b_a3b_tiny")), 264), "FOLDER")
alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
of_bytes = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
of_bytes.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
of_bytes.decoder = tokenizers.decoders.ByteLevel()
of_bytes.save("FOLDER/tokenizer.json")
"""
# What the text around the blocks says of them.
AFTER = """
assert moe_jax.load("COPY").model.embedding_VD.shape == loaded.model.embedding_VD.shape
assert max_vio.shape == (1,) and max_vio[0] < 0.6 * step(Model(nnx.Rngs(0)), optimizer, x_BLD)[0], max_vio
assert [(r["arm"], r["seed"]) for r in results] == [(arm, s) for arm in arms for s in range(3)]
assert run.step == 2 and str(run.config.model.moe.router) == "cosine:0.1"
assert type(run.model.segments[0].pattern.blocks[0].ffn.router) is CosineRouter
assert all((layer_BLE.sum(-1) == 2).all() for layer_BLE in chosen)
domains = moe_jax.load_dataset(run.config.data).info.domains  # one batch need not have a window of each
assert {"all"} < set(scores) <= {"all", *domains} and scores["all"].num_bytes > 0
print("every block ran")
"""


def python_blocks(markdown: str) -> list[str]:
  return re.findall(r"^```python\n(.*?)^```", markdown, re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_every_python_block_of_the_readme_runs(tmp_path):
  blocks = python_blocks((ROOT / "README.md").read_text())
  assert len(blocks) == 4
  program = tmp_path / "readme.py"
  program.write_text("\n".join([BEFORE, *blocks, AFTER]))
  done = subprocess.run(
    [sys.executable, str(program)],
    cwd=tmp_path,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=200,
    check=False,
  )
  assert done.stdout.strip().endswith("every block ran"), done.stderr


COMPARISONS = ("load_balancing", "routers", "capacity", "granularity")


def commands(markdown: str) -> list[tuple[str, list[str], int]]:
  """(script, arguments, devices) of the comparisons that need nothing from before."""
  prefix = (
    r"(?:XLA_FLAGS=\S+count=(\d) )?(?:bash scripts/(quickstart)\.sh|\.venv/bin/python experiments/(\w+)\.py)"
  )
  found = []
  for line in markdown.splitlines():
    if match := re.match(prefix, line):
      devices, quick, name = match.groups()
      given = shlex.split(line[match.end() :], comments=True)
      if quick:  # what it runs
        name, given = "load_balancing", ["--preset=quick", *given]
      if name in COMPARISONS and not {"--help"} & set(given) and "$" not in line:
        found.append((f"experiments/{name}.py", given, int(devices or 1)))
  return found


def test_every_comparison_of_the_readme_is_accepted(tmp_path):
  """Up to the first step, on a text that is made at once."""
  children = {devices: Child(tmp_path / str(devices), devices) for devices in (1, 8)}
  every = commands((ROOT / "README.md").read_text())
  try:
    for i, (script, given, devices) in enumerate(every):
      given = [
        re.sub("^--plugins=", f"--plugins={ROOT}/", a) for a in given if not a.startswith("--output_dir=")
      ]
      text = [] if any(a.startswith("--dataset=") for a in given) else ["--dataset=markov"]
      ended = children[devices].ask(script, [*given, *text, f"--output_dir={tmp_path}/run_{i}"])
      assert ended["status"] == 0, (script, given, ended["err"])
  finally:
    for child in children.values():
      child.close()
  assert len(every) > 12 and any(devices == 8 for _, _, devices in every)


def test_the_router_of_the_readme_is_the_example():
  _, _, router, _ = python_blocks((ROOT / "README.md").read_text())
  definition = router.partition("\n\n\n")[0]
  assert definition in (ROOT / "experiments/examples/cosine_router.py").read_text()
