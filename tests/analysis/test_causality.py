"""Later tokens must not affect earlier ones in a language model, unless the router declares that they do."""

import pytest

from moe_jax.analysis.causality import future_influence
from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.nn.build import different_blocks, resolve
from moe_jax.nn.leaks import leak

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
