"""The whole configuration of a training run."""

import dataclasses
from typing import Any

from moe_jax.config.fields import require
from moe_jax.config.model import ModelConfig
from moe_jax.config.plain import from_fields, model_from_plain, to_plain
from moe_jax.config.training import DataConfig, MeshConfig, OptimizerConfig, TrainConfig


@dataclasses.dataclass(frozen=True)
class Config:
  """The whole configuration of a training run."""

  model: ModelConfig = ModelConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  data: DataConfig = DataConfig()
  train: TrainConfig = TrainConfig()
  mesh: MeshConfig = MeshConfig()

  def check(self) -> "Config":
    """Returns `self`. Raises `InputError` for the first wrong field."""
    for part in (self.model, self.optimizer, self.data, self.train, self.mesh):
      part.check()
    require(
      self.data.batch_size % self.train.accumulation == 0,
      "accumulation",
      self.train.accumulation,
      f"must divide batch_size={self.data.batch_size}",
    )
    return self

  def to_dict(self) -> dict[str, Any]:
    """Returns JSON values, with methods as the text that names them."""
    return to_plain(self)

  @classmethod
  def from_dict(cls, values: dict[str, Any]) -> "Config":
    """The inverse of `to_dict`, provided that methods are registered under their names.

    Raises:
      InputError: if a field does not exist in this version.
    """
    others = {"optimizer": OptimizerConfig, "data": DataConfig, "train": TrainConfig, "mesh": MeshConfig}
    parts = {name: from_fields(part, values[name]) for name, part in others.items()}
    return cls(model=model_from_plain(values["model"]), **parts)
