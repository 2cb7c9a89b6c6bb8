"""Decoders of the size of two published encoder-decoders. The experts are theirs, number for number; the rest is not:
one decoder with rotary positions stands for encoder and decoder, without cross-attention, so the totals differ by under 1%.

  gshard_600b_like   GShard (2006.16668), 36 layers, every other one with 2,048 experts: 36,864 experts with
                     618.5e9 parameters. Its model translates; top-2 with its own way of dropping.
  switch_c_like      Switch-C (2101.03961, table 9), 15 + 15 layers, all with 2,048 experts: 61,440 experts with
                     1,570.4e9 parameters, top-1. A width of 2,080 and 32 heads of 64.
"""

from moe_jax.config import Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig
from moe_jax.models.settings import TOY_VOCAB_SIZE, Published, tiny

# 2,048 experts have slots only in groups of thousands of tokens: at T = 2048 and K = 2, GShard's C = 2T/E is 2.
_DATA = DataConfig(sequence_length=2048, batch_size=2048)

_FULL = {
  "gshard_600b_like": Config(
    model=ModelConfig(
      num_layers=36,
      model_dim=1024,
      num_heads=16,
      num_kv_heads=16,
      head_dim=128,
      dense_dim=8192,
      moe_every=2,
      compute_dtype="bfloat16",
      activation="relu",
      moe=MoEConfig(
        num_experts=2048,
        num_experts_per_token=2,
        expert_dim=8192,
        experts="relu",
        router="gshard_top2",
        balancers="gshard_loss:0.01",  # the weight of Mesh-TensorFlow; the paper gives none
        dispatcher="einsum",
        capacity_factor=1.0,
        group_size=2048,
        accept_leaks="gshard_top2",  # a full expert drops a second choice for the first choice of a later token
      ),
    ),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=10_000),
    data=_DATA,
    train=TrainConfig(num_steps=100_000, log_every=100, checkpoint_every=1000),
  ),
  "switch_c_like": Config(
    model=ModelConfig(
      num_layers=30,
      model_dim=2080,
      num_heads=32,
      num_kv_heads=32,
      head_dim=64,
      dense_dim=6144,
      init_scale=0.1,
      compute_dtype="bfloat16",
      activation="relu",
      moe=MoEConfig(
        num_experts=2048,
        num_experts_per_token=1,
        expert_dim=6144,
        experts="relu",
        router="switch_top1",
        balancers="switch_loss:0.01",
        dispatcher="einsum",
        capacity_factor=1.25,
        group_size=2048,
        jitter=0.01,
      ),
    ),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=10_000),
    data=_DATA,
    train=TrainConfig(num_steps=100_000, log_every=100, checkpoint_every=1000),
  ),
}
_TOY = {"num_experts": 16, "group_size": 0}
PRESETS = _FULL | {
  f"{name}_tiny": tiny(config, _TOY, num_layers=2, num_kv_heads=4) for name, config in _FULL.items()
}
PUBLISHED = {
  "gshard_600b_like": Published("600B", "", "2006.16668, table 1"),
  "switch_c_like": Published("1571B", "", "2101.03961, table 9"),
}
VOCAB_SIZES = dict.fromkeys(PRESETS, TOY_VOCAB_SIZE) | {"gshard_600b_like": 32_000, "switch_c_like": 32_128}
