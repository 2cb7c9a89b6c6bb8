"""One small model at three lengths, and a smaller one for trying things out. They train on a laptop's CPU.

- `quick`: a tour of a few minutes. The model has not learned enough for a conclusion.
- `default`: 1.2 million tokens (3.5 million bytes), a minute or two a run. The comparison of the README.
- `long`: 18 million tokens (51 million bytes, eight passes over the text), a night for a few arms.
"""

from moe_jax.config import Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig


def _length(num_steps: int, batch_size: int, warmup_steps: int, checkpoint_every: int) -> Config:
  return Config(
    optimizer=OptimizerConfig(warmup_steps=warmup_steps),
    data=DataConfig(tokenizer="bpe:2048", batch_size=batch_size),
    train=TrainConfig(num_steps=num_steps, checkpoint_every=checkpoint_every),
  )


_TINY = Config(
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
)

PRESETS = {
  "quick": _length(num_steps=100, batch_size=16, warmup_steps=20, checkpoint_every=0),
  "default": _length(num_steps=600, batch_size=16, warmup_steps=50, checkpoint_every=200),
  "long": _length(num_steps=4400, batch_size=32, warmup_steps=100, checkpoint_every=500),
  "tiny": _TINY,
}
PUBLISHED: dict = {}
VOCAB_SIZES = {"quick": 2048, "default": 2048, "long": 2048, "tiny": 264}  # of their tokenizers
