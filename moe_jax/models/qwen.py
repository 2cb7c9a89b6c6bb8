"""Qwen3-30B-A3B (2505.09388): the published architecture; schedule and batch are ours.

With its embedding of 151,936 rows it has 30,532,122,624 parameters, 3.35e9 of them active.
"""

from moe_jax.config import Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig

PRESETS = {
  "qwen3_30b_a3b": Config(
    model=ModelConfig(
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
        balancers="switch_loss:0.000166667",  # 0.001 in Hugging Face's convention: x K / num_layers
        dispatcher="dropless",
      ),
    ),
    optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000),
    data=DataConfig(sequence_length=4096, batch_size=256),
    train=TrainConfig(num_steps=100_000, log_every=100, checkpoint_every=1000),
  ),
}
VOCAB_SIZES = {"qwen3_30b_a3b": 151_936}
