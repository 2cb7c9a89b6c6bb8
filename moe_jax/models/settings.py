"""What the configurations of published models share beside their architecture. Schedules and batches are ours."""

import dataclasses
from typing import Any

from moe_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig

TOY_VOCAB_SIZE = 264  # of the tokenizer of bytes


@dataclasses.dataclass(frozen=True)
class Published:
  """What the authors of a model say about its size, in their words."""

  total: str
  active: str
  source: str


def published(
  model: ModelConfig, optimizer: str = "adamw", objective: str = "next_token", hooks: str = ""
) -> Config:
  """Returns the configuration that trains a model of published size."""
  return Config(
    model=model,
    optimizer=OptimizerConfig(optimizer=optimizer, learning_rate=3e-4, warmup_steps=2000),
    data=DataConfig(sequence_length=4096, batch_size=256),
    train=TrainConfig(
      objective=objective, hooks=hooks, num_steps=100_000, log_every=100, checkpoint_every=1000
    ),
  )


def tiny(config: Config, moe: dict[str, Any], **fields: Any) -> Config:
  """Returns `config` at toy size, for tests and laptops.

  Args:
    config: of a published model.
    moe: fields of its `MoEConfig` to replace.
    **fields: fields of its `ModelConfig` to replace, beside the usual ones.
  """
  sizes = {"model_dim": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "dense_dim": 48}
  moe_config = dataclasses.replace(config.model.moe, **{"expert_dim": 16} | moe)
  model = dataclasses.replace(config.model, **sizes | {"compute_dtype": "float32"} | fields, moe=moe_config)
  train = TrainConfig(
    objective=config.train.objective, hooks=config.train.hooks, num_steps=60, eval_batches=20
  )
  return Config(
    model=model,
    optimizer=OptimizerConfig(optimizer=config.optimizer.optimizer, warmup_steps=10),
    data=DataConfig(sequence_length=64, batch_size=8),
    train=train,
  )
