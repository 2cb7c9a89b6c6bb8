"""Mixtral (2401.04088): the published architecture; schedule and batch are ours, the paper gives none.

With its tokenizer of 32,000 ids the 8x7B has 46,702,792,704 parameters, 12.88e9 of them active.
"""

from moe_jax.config import Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig

PRESETS = {
  "mixtral_8x7b": Config(
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
        balancers="switch_loss:0.01",  # 0.02 in Hugging Face's convention, which is K at balance
        dispatcher="dropless",
      ),
    ),
    optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000),
    data=DataConfig(sequence_length=4096, batch_size=256),
    train=TrainConfig(num_steps=100_000, log_every=100, checkpoint_every=1000),
  ),
}
