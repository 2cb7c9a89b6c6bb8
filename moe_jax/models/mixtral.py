"""Mixtral (2401.04088): experts instead of the feed-forward part, two of eight for each token."""

import dataclasses

from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.models.settings import TOY_VOCAB_SIZE, Published, published, tiny

_8X7B = ModelConfig(
  num_layers=32,
  model_dim=4096,
  num_heads=32,
  num_kv_heads=8,
  head_dim=128,
  dense_dim=14336,
  rope_theta=1e6,
  norm_eps=1e-5,
  compute_dtype="bfloat16",
  moe=MoEConfig(
    num_experts=8,
    num_experts_per_token=2,
    expert_dim=14336,
    router="softmax_topk:softmax=after",
    balancers="switch_loss:0.00125",  # 0.02 in Hugging Face's convention: x K / num_layers
    dispatcher="dropless",
  ),
)
_8X22B = dataclasses.replace(
  _8X7B,
  num_layers=56,
  model_dim=6144,
  num_heads=48,
  dense_dim=16384,
  moe=dataclasses.replace(_8X7B.moe, expert_dim=16384, balancers="switch_loss:3.57143e-05"),  # 0.001 there
)

_FULL = {"mixtral_8x7b": published(_8X7B), "mixtral_8x22b": published(_8X22B)}
PRESETS = _FULL | {f"{name}_tiny": tiny(config, {}, num_layers=2) for name, config in _FULL.items()}
VOCAB_SIZES = dict.fromkeys(PRESETS, TOY_VOCAB_SIZE) | dict.fromkeys(_FULL, 32_000)
PUBLISHED = {
  "mixtral_8x7b": Published("47B", "13B", "2401.04088"),
  "mixtral_8x22b": Published("141B", "39B", "mistral.ai/news/mixtral-8x22b"),
}
