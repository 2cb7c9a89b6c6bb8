"""DeepSeek's models: DeepSeekMoE-16B (2401.06066), V2 and V2-Lite (2405.04434), V3 (2412.19437).

All have many small routed experts, shared experts, and dense first layers. From V2 on, attention is latent. R1 has the
architecture of V3. What the papers call groups of experts are devices in V2, and nodes in V3.
"""

import dataclasses

from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.models.settings import TOY_VOCAB_SIZE, Published, published, tiny

_MOE_16B = ModelConfig(
  num_layers=28,
  num_dense_first=1,
  model_dim=2048,
  num_heads=16,
  num_kv_heads=16,
  head_dim=128,
  dense_dim=10944,
  rope_theta=10_000.0,
  norm_eps=1e-6,
  compute_dtype="bfloat16",
  moe=MoEConfig(
    num_experts=64,
    num_experts_per_token=6,
    expert_dim=1408,
    num_shared_experts=2,
    router="softmax_topk:softmax=before",
    balancers="switch_loss:0.001",
    dispatcher="dropless",
  ),
)
_YARN = "yarn_factor=40:yarn_length={length}:yarn_mscale={mscale}:yarn_mscale_all_dim={mscale}"
_V2_YARN, _V3_YARN = _YARN.format(length=4096, mscale=0.707), _YARN.format(length=4096, mscale=1.0)
_V2_LITE = dataclasses.replace(_MOE_16B, num_layers=27, mixer=f"mla:kv_rank=512:{_V2_YARN}")
_V2 = dataclasses.replace(
  _MOE_16B,
  num_layers=60,
  model_dim=5120,
  num_heads=128,
  num_kv_heads=128,
  dense_dim=12288,
  mixer=f"mla:query_rank=1536:kv_rank=512:{_V2_YARN}",
  moe=dataclasses.replace(
    _MOE_16B.moe,
    num_experts=160,
    expert_dim=1536,
    router="device_limited_topk:groups=8:groups_per_token=3:scale=16.0",
    balancers="switch_loss:0.003:scope=sequence,device_loss:0.05:devices=8,communication_loss:0.02:devices=8",
  ),
)
_V3 = dataclasses.replace(
  _V2,
  num_layers=61,
  num_dense_first=3,
  model_dim=7168,
  dense_dim=18432,
  mixer=f"mla:query_rank=1536:kv_rank=512:{_V3_YARN}",
  mtp_depth=1,
  moe=MoEConfig(
    num_experts=256,
    num_experts_per_token=8,
    expert_dim=2048,
    num_shared_experts=1,
    router="node_limited_topk:groups=8:groups_per_token=4:scale=2.5",
    balancers="loss_free_bias:0.001,sequence_loss:0.0001",
    dispatcher="dropless",
  ),
)

_FULL = {
  "deepseek_moe_16b": published(_MOE_16B),
  "deepseek_v2_lite": published(_V2_LITE),
  "deepseek_v2": published(_V2),
  "deepseek_v3": published(_V3, objective="next_tokens:weight=0.3"),
}
_SMALL = {"num_experts": 16, "num_experts_per_token": 3}
_TOY_MLA = "mla:query_rank=12:kv_rank=16:" + _YARN.format(length=16, mscale=1.0)
_DEVICE_LOSSES = "device_loss:0.05:devices=4,communication_loss:0.02:devices=4:devices_per_token=2"
PRESETS = _FULL | {
  "deepseek_moe_16b_tiny": tiny(_FULL["deepseek_moe_16b"], _SMALL, num_layers=3, num_kv_heads=4),
  "deepseek_v2_lite_tiny": tiny(
    _FULL["deepseek_v2_lite"],
    _SMALL,
    num_layers=3,
    mixer="mla:kv_rank=16:" + _YARN.format(length=16, mscale=0.707),
  ),
  "deepseek_v2_tiny": tiny(
    _FULL["deepseek_v2"],
    _SMALL
    | {
      "router": "device_limited_topk:groups=4:groups_per_token=2:scale=1.0",
      "balancers": f"switch_loss:0.003:scope=sequence,{_DEVICE_LOSSES}",
    },
    num_layers=3,
    mixer=_TOY_MLA,
  ),
  "deepseek_v3_tiny": tiny(
    _FULL["deepseek_v3"],
    _SMALL | {"router": "node_limited_topk:groups=4:groups_per_token=2:scale=2.5"},
    num_layers=4,
    num_dense_first=2,
    mixer=_TOY_MLA,
  ),
}
VOCAB_SIZES = (
  dict.fromkeys(PRESETS, TOY_VOCAB_SIZE) | dict.fromkeys(_FULL, 102_400) | {"deepseek_v3": 129_280}
)
PUBLISHED = {
  "deepseek_moe_16b": Published("16.4B", "2.8B", "2401.06066"),
  "deepseek_v2_lite": Published("15.7B", "2.4B", "2405.04434"),
  "deepseek_v2": Published("236B", "21B", "2405.04434"),
  "deepseek_v3": Published("671B", "37B", "2412.19437"),
}
