"""Qwen's models: Qwen1.5-MoE, Qwen2-57B-A14B (2407.10671) and Qwen3 (2505.09388).

The older two have a shared expert that each token scales by a sigmoid, biases on queries, keys and values, and weights
that are not renormalised. Qwen3 has none of these. It normalises queries and keys, and the weights of the chosen
experts.
"""

import dataclasses

from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.models.settings import TOY_VOCAB_SIZE, Published, published, tiny

_QWEN15 = ModelConfig(
  num_layers=24,
  model_dim=2048,
  num_heads=16,
  num_kv_heads=16,
  head_dim=128,
  dense_dim=5632,
  mixer="attention:qkv_bias=true",
  rope_theta=1e6,
  norm_eps=1e-6,
  compute_dtype="bfloat16",
  moe=MoEConfig(
    num_experts=60,
    num_experts_per_token=4,
    expert_dim=1408,
    num_shared_experts=1,
    shared_expert_dim=5632,  # four times that of a routed expert
    shared_expert_gate=True,
    router="softmax_topk:softmax=before",
    balancers="switch_loss:0.000166667",  # here and below 0.001 in Hugging Face's convention: x K / num_layers
    dispatcher="dropless",
  ),
)
_QWEN2 = dataclasses.replace(
  _QWEN15,
  num_layers=28,
  model_dim=3584,
  num_heads=28,
  num_kv_heads=4,
  dense_dim=18944,
  moe=dataclasses.replace(
    _QWEN15.moe,
    num_experts=64,
    num_experts_per_token=8,
    expert_dim=2560,
    shared_expert_dim=20480,
    balancers="switch_loss:0.000285714",
  ),
)
_QWEN3 = ModelConfig(
  num_layers=48,
  model_dim=2048,
  num_heads=32,
  num_kv_heads=4,
  head_dim=128,
  dense_dim=6144,
  rope_theta=1e6,
  norm_eps=1e-6,
  qk_norm=True,
  compute_dtype="bfloat16",
  moe=MoEConfig(
    num_experts=128,
    num_experts_per_token=8,
    expert_dim=768,
    router="softmax_topk:softmax=after",  # weights sum to 1 over the chosen
    balancers="switch_loss:0.000166667",
    dispatcher="dropless",
  ),
)
_QWEN3_235B = dataclasses.replace(
  _QWEN3,
  num_layers=94,
  model_dim=4096,
  num_heads=64,
  dense_dim=12288,
  moe=dataclasses.replace(_QWEN3.moe, expert_dim=1536, balancers="switch_loss:8.51064e-05"),
)

_FULL = {
  "qwen15_moe_a27b": published(_QWEN15),
  "qwen2_57b_a14b": published(_QWEN2),
  "qwen3_30b_a3b": published(_QWEN3),
  "qwen3_235b_a22b": published(_QWEN3_235B),
}
_TOY = {
  "qwen15_moe_a27b": {"num_experts": 6, "num_experts_per_token": 2, "shared_expert_dim": 40},
  "qwen2_57b_a14b": {"num_experts": 16, "num_experts_per_token": 3, "shared_expert_dim": 40},
  "qwen3_30b_a3b": {"num_experts": 16, "num_experts_per_token": 3},
  "qwen3_235b_a22b": {"num_experts": 16, "num_experts_per_token": 3},
}
PRESETS = _FULL | {f"{name}_tiny": tiny(_FULL[name], moe, num_layers=2) for name, moe in _TOY.items()}
VOCAB_SIZES = dict.fromkeys(PRESETS, TOY_VOCAB_SIZE) | dict.fromkeys(_FULL, 151_936)
PUBLISHED = {
  "qwen15_moe_a27b": Published("14.3B", "2.7B", "Qwen/Qwen1.5-MoE-A2.7B"),
  "qwen2_57b_a14b": Published("57.4B", "14B", "2407.10671"),
  "qwen3_30b_a3b": Published("30.5B", "3.3B", "2505.09388"),
  "qwen3_235b_a22b": Published("235B", "22B", "2505.09388"),
}
