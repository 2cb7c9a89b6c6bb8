"""One training run, whole."""

import dataclasses
from typing import Any

from moe_jax.config.fields import require
from moe_jax.config.model import ModelConfig
from moe_jax.config.plain import from_fields, model_from_plain, to_plain
from moe_jax.config.training import DataConfig, MeshConfig, OptimizerConfig, TrainConfig


@dataclasses.dataclass(frozen=True)
class Config:
  """One training run, whole."""

  model: ModelConfig = ModelConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  data: DataConfig = DataConfig()
  train: TrainConfig = TrainConfig()
  mesh: MeshConfig = MeshConfig()

  def check(self) -> "Config":
    """Raises `InputError` on the first wrong field; returns itself."""
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
    """JSON values; methods as the text that names them."""
    return to_plain(self)

  @classmethod
  def from_dict(cls, values: dict[str, Any]) -> "Config":
    """The inverse of `to_dict`, where methods have names.

    Raises:
      InputError: fields that this version does not have.
    """
    others = {"optimizer": OptimizerConfig, "data": DataConfig, "train": TrainConfig, "mesh": MeshConfig}
    parts = {name: from_fields(part, values[name]) for name, part in others.items()}
    return cls(model=model_from_plain(values["model"]), **parts)
