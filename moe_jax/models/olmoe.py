"""OLMoE-1B-7B (2409.02060): 64 small experts in every layer, and a norm over all heads of queries or keys at once."""

from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.models.settings import TOY_VOCAB_SIZE, Published, published, tiny

_OLMOE = ModelConfig(
  num_layers=16,
  model_dim=2048,
  num_heads=16,
  num_kv_heads=16,
  head_dim=128,
  dense_dim=1024,
  mixer="attention:qk_norm_over=projection",
  rope_theta=10_000.0,
  norm_eps=1e-5,
  qk_norm=True,
  compute_dtype="bfloat16",
  moe=MoEConfig(
    num_experts=64,
    num_experts_per_token=8,
    expert_dim=1024,
    router="softmax_topk:softmax=before",
    # 0.01 and 0.001 in the convention of MegaBlocks: / num_layers, and for the second also / K
    balancers="switch_loss:0.000625,z_loss:7.8125e-06",
    dispatcher="dropless",
  ),
)

PRESETS = {"olmoe_1b_7b": published(_OLMOE)}
PRESETS["olmoe_1b_7b_tiny"] = tiny(
  PRESETS["olmoe_1b_7b"], {"num_experts": 16, "num_experts_per_token": 3}, num_layers=2
)
VOCAB_SIZES = {"olmoe_1b_7b": 50_304, "olmoe_1b_7b_tiny": TOY_VOCAB_SIZE}
PUBLISHED = {"olmoe_1b_7b": Published("6.9B", "1.3B", "2409.02060")}
