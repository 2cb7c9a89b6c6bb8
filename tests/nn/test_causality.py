"""Later tokens must not affect earlier ones in a language model, unless the router declares that they do."""

import pytest

from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.nn.build import different_blocks, resolve
from moe_jax.nn.causality import future_influence
from moe_jax.nn.leaks import leak
from tests.scripts import run_scripts

# All routers obey the same law on logits (tests/ops/test_router_laws.py), and `python scripts/leaks.py` does this for all.
SOME = [
  {"router": "sigmoid_topk"},
  {"router": "gshard_top2"},
  {"router": "expert_choice"},
  {"router": "base_assignment", "num_experts_per_token": 1},
  {"ffn": "soft_moe"},
]


@pytest.mark.parametrize("fields", SOME, ids=lambda fields: next(iter(fields.values())))
def test_a_model_leaks_as_its_router_declares(fields):
  ffn = fields.get("ffn", "moe")
  options = {"dispatcher": "sorted"} | {k: v for k, v in fields.items() if k != "ffn"}
  moe = MoEConfig(num_experts=4, expert_dim=8, **options)
  (block,) = different_blocks(resolve(ModelConfig(ffn=ffn, moe=moe)))
  seen = {drops: future_influence(moe, ffn=ffn, drops=drops) > 1e-3 for drops in (True, False)}
  want = {"": (False, False), "drops": (True, False), "always": (True, True)}[leak(block)]
  assert (seen[True], seen[False]) == want


PLUGIN = """
import jax.numpy as jnp, moe_jax
class Peek(moe_jax.Router):
  def __init__(self, dim, num_experts, num_experts_per_token, *, rngs):
    self.k = num_experts_per_token
    self.w_DE = moe_jax.matrix(rngs, (dim, num_experts), ("embed", "router"))
  def __call__(self, x_GTD, context):
    return moe_jax.top_k(moe_jax.project(jnp.roll(x_GTD, -1, 1), self.w_DE[...]), self.k, context)
moe_jax.register("router", "peek", Peek)
"""


def test_the_script_measures_routers_of_ones_own(tmp_path):
  (tmp_path / "mine.py").write_text(PLUGIN)
  (ended,) = run_scripts(
    ["scripts/leaks.py", "--routers=softmax_topk,peek", f"--plugins={tmp_path / 'mine.py'}"]
  )
  lines = ended.stdout.splitlines()
  assert lines[2] == "| `softmax_topk` | never | 0 | 0 |"
  assert lines[3].startswith("| `peek` | never | ") and " 0 |" not in lines[3]
  assert (ended.status, ended.stderr) == (1, "error: a router leaks differently than it declares\n")
