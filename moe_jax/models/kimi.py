"""Kimi K2 (2507.20534): the architecture of DeepSeek-V3 with more experts, half the heads, and no groups of experts.

It was trained with MuonClip: Muon, and a limit on attention scores (`moe_jax.training.hooks.QKClip`).
"""

from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.models.settings import TOY_VOCAB_SIZE, Published, published, tiny


def _mixer(query_rank: int, kv_rank: int, yarn_length: int) -> str:
  ranks = f"mla:query_rank={query_rank}:kv_rank={kv_rank}"
  yarn = f"yarn_factor=32:yarn_length={yarn_length}:yarn_beta_fast=1:yarn_beta_slow=1"
  return f"{ranks}:{yarn}:yarn_mscale=1.0:yarn_mscale_all_dim=1.0"


_K2 = ModelConfig(
  num_layers=61,
  num_dense_first=1,
  model_dim=7168,
  num_heads=64,
  num_kv_heads=64,
  head_dim=128,
  dense_dim=18432,
  mixer=_mixer(1536, 512, 4096),
  rope_theta=50_000.0,
  norm_eps=1e-6,
  compute_dtype="bfloat16",
  moe=MoEConfig(
    num_experts=384,
    num_experts_per_token=8,
    expert_dim=2048,
    num_shared_experts=1,
    router="sigmoid_topk:normalize=true:scale=2.827",
    balancers="loss_free_bias:0.001,sequence_loss:0.0001",
    dispatcher="dropless",
  ),
)

PRESETS = {"kimi_k2": published(_K2, optimizer="muon", hooks="qk_clip:100")}
PRESETS["kimi_k2_tiny"] = tiny(
  PRESETS["kimi_k2"],
  {"num_experts": 16, "num_experts_per_token": 3},
  num_layers=3,
  mixer=_mixer(query_rank=12, kv_rank=16, yarn_length=16),
)
VOCAB_SIZES = {"kimi_k2": 163_840, "kimi_k2_tiny": TOY_VOCAB_SIZE}
PUBLISHED = {"kimi_k2": Published("1.04T", "32.6B", "2507.20534")}
