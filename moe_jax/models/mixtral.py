"""Mixtral (2401.04088): the published architecture; schedule and batch are ours, the paper gives none.

With its tokenizer of 32,000 ids the 8x7B has 46,702,792,704 parameters, 12.88e9 of them active, and the 8x22B
140,620,634,112 and 39.15e9.
"""

import dataclasses

from moe_jax.config import Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig

_8X7B = Config(
  model=ModelConfig(
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
  ),
  optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000),
  data=DataConfig(sequence_length=4096, batch_size=256),
  train=TrainConfig(num_steps=100_000, log_every=100, checkpoint_every=1000),
)
_8X22B = dataclasses.replace(
  _8X7B.model,
  num_layers=56,
  model_dim=6144,
  num_heads=48,
  dense_dim=16384,
  moe=dataclasses.replace(
    _8X7B.model.moe, expert_dim=16384, balancers="switch_loss:3.57143e-05"
  ),  # 0.001 there
)

PRESETS = {"mixtral_8x7b": _8X7B, "mixtral_8x22b": dataclasses.replace(_8X7B, model=_8X22B)}
VOCAB_SIZES = {"mixtral_8x7b": 32_000, "mixtral_8x22b": 32_000}
