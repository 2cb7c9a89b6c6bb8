"""A new part of each kind is one file and one registry line: added here, in a copy of the package, and used."""

import os
import pathlib
import shutil
import subprocess
import sys
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]


class Kind(NamedTuple):
  file: str  # the new one
  code: str
  registry: str  # the file with the registry
  line: tuple[str, str]  # an entry that is there, and the code of the new part in its module


KINDS = {
  "router": Kind(
    "ops/routing/brand_new.py",
    '''
from moe_jax.ops.routing.common import Choice
from moe_jax.ops.routing.topk import softmax_topk

def part(num_experts: int, num_experts_per_token: int, scale: float = 2.0) -> Choice:
  """Top-k of scaled logits."""
  plain = softmax_topk(num_experts, num_experts_per_token)
  return plain._replace(choose=lambda logits_TE, context: plain.choose(scale * logits_TE, context))
''',
    "ops/routing/__init__.py",
    ('"softmax_topk": softmax_topk,', "part"),
  ),
  "balancer": Kind(
    "ops/balancing/brand_new.py",
    '''
from moe_jax.ops.balancing.common import Balancer

def part(weight: float = 0.5) -> Balancer:
  """A constant."""
  return Balancer(losses=lambda state, routing, stats: {"constant": weight + 0 * routing.logits_BLE.sum()})
''',
    "ops/balancing/__init__.py",
    ('"none": none,', "part"),
  ),
  "experts": Kind(
    "nn/experts/brand_new.py",
    '''
import jax.numpy as jnp
from moe_jax.nn.experts.plain import ReLU

class part(ReLU):
  """Squared ReLU."""
  activation = staticmethod(lambda x: jnp.maximum(x, 0) ** 2)
''',
    "nn/experts/__init__.py",
    ('"relu": ReLU,', "part"),
  ),
  "mixer": Kind(
    "nn/mixers/brand_new.py",
    '''
import jax.numpy as jnp
from flax import nnx

class part(nnx.Module):
  """The mean of what is before."""
  def __init__(self, dim):
    pass
  def __call__(self, x_BLD, context):
    return jnp.cumsum(x_BLD, axis=1) / jnp.arange(1, x_BLD.shape[1] + 1)[None, :, None], None
''',
    "nn/mixers/__init__.py",
    ('{"attention": Attention,', "part"),
  ),
  "objective": Kind(
    "training/brand_new_objective.py",
    '''
import dataclasses
from moe_jax.training.objectives import NextToken

@dataclasses.dataclass(frozen=True)
class part(NextToken):
  """Twice the likelihood."""
  def token_losses(self, logits_BLV, targets_BL):
    return 2 * super().token_losses(logits_BLV, targets_BL)
''',
    "training/objectives.py",
    ('"next_token": NextToken,', "part"),
  ),
  "hook": Kind(
    "training/brand_new_hook.py",
    '''
from moe_jax.training.hooks import Hook

class part(Hook):
  """Counts steps."""
  def init(self, model):
    return 0
  def __call__(self, model, state, aux):
    return state + 1
''',
    "training/hooks.py",
    ('"average_parameters": AverageParameters', "part"),
  ),
  "metric": Kind(
    "ops/brand_new.py",
    """
part = lambda Metric: Metric(lambda layer: layer.tokens_per_expert_BE.sum(), lambda x: x, "Assigned")
""",
    "ops/metrics.py",
    ('"dead_experts": Metric(', "part(Metric)"),
  ),
}

USE = """
import dataclasses, tempfile
import moe_jax
assert moe_jax.__file__.startswith({root!r}), moe_jax.__file__
moe = moe_jax.MoEConfig(4, 2, 8, router="brand_new:3", balancers="brand_new:0.25", experts="brand_new")
config = moe_jax.preset("tiny")
config = dataclasses.replace(
  config,
  model=dataclasses.replace(config.model, num_layers=1, model_dim=16, mixer="brand_new", moe=moe),
  mesh=moe_jax.MeshConfig(data=1),
  data=dataclasses.replace(config.data, dataset="markov", sequence_length=16, batch_size=2, markov_states=16),
  train=dataclasses.replace(
    config.train, objective="brand_new", hooks="brand_new", num_steps=2, eval_batches=1, tensorboard=False
  ),
)
with tempfile.TemporaryDirectory() as folder:
  result = moe_jax.Run(config, moe_jax.load_dataset(config.data), folder).train()
assert result["training"]["newly_assigned"] == [2 * 16 * 2], result["training"]
assert [c["title"] for c in result["columns"] if c["name"] == "newly_assigned"] == ["Assigned"]
print("used")
"""


def _add(package: pathlib.Path, kind: Kind) -> set[str]:
  """The files that adding the part changes."""
  (package / kind.file).write_text(f'"""A part that is new."""\n{kind.code}')
  registry = package / kind.registry
  text, (there, code) = registry.read_text(), kind.line
  assert text.count(there) == 1, kind.registry
  module = kind.file.removesuffix(".py").replace("/", ".")
  name = (
    "newly_assigned" if kind is KINDS["metric"] else "brand_new"
  )  # logs have losses and metrics under their names
  entry = f'"{name}": __import__("importlib").import_module("moe_jax.{module}").{code}, '
  registry.write_text(text.replace(there, there.replace('"', entry + '"', 1), 1))
  return {kind.file, kind.registry}


def test_a_part_of_each_kind_is_one_file_and_one_line(tmp_path):
  shutil.copytree(ROOT / "moe_jax", tmp_path / "moe_jax", ignore=shutil.ignore_patterns("__pycache__"))
  before = {p: p.read_bytes() for p in (tmp_path / "moe_jax").rglob("*.py")}
  for kind in KINDS.values():
    assert len(_add(tmp_path / "moe_jax", kind)) == 2
  after = {p: p.read_bytes() for p in (tmp_path / "moe_jax").rglob("*.py")}
  assert sum(before.get(p) != text for p, text in after.items()) == 2 * len(KINDS)
  command = [sys.executable, "-c", USE.format(root=str(tmp_path))]
  done = subprocess.run(
    command,
    cwd=tmp_path,
    env=os.environ | {"PYTHONPATH": str(tmp_path)},
    capture_output=True,
    text=True,
    timeout=200,
  )
  assert done.stdout.strip().endswith("used"), done.stderr
