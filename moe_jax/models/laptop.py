"""Models that train on a laptop's CPU in minutes."""

from moe_jax.config import Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig

PRESETS = {
  # The comparison of the README: small enough for nine runs in minutes, large enough to collapse
  # without balancing.
  "default": Config(),
  # For trying a change: a comparison in about a minute, too short for a conclusion.
  "tiny": Config(
    model=ModelConfig(
      num_layers=2,
      model_dim=32,
      num_heads=2,
      num_kv_heads=1,
      head_dim=16,
      dense_dim=64,
      moe=MoEConfig(num_experts=8, expert_dim=32),
    ),
    optimizer=OptimizerConfig(warmup_steps=10),
    data=DataConfig(sequence_length=64, batch_size=8),
    train=TrainConfig(num_steps=60, eval_batches=20),
  ),
}
VOCAB_SIZES = {"default": 264, "tiny": 264}  # of the bytes tokenizer
