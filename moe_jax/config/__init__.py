"""Configuration: frozen dataclasses of plain values, with each part said by name or object.

Every field with a help text is a flag of the experiment scripts with the same name, and `check` answers a wrong value
with one line that names the field. No part is imported here: `moe_jax.nn.build.resolve` turns names into `Method`s.
"""

from moe_jax.config.model import BlockConfig, ModelConfig, MoEConfig, Segment
from moe_jax.config.plain import spec_text
from moe_jax.config.run import Config
from moe_jax.config.training import DataConfig, MeshConfig, OptimizerConfig, TrainConfig

__all__ = [
  "BlockConfig",
  "Config",
  "DataConfig",
  "MeshConfig",
  "MoEConfig",
  "ModelConfig",
  "OptimizerConfig",
  "Segment",
  "TrainConfig",
  "spec_text",
]
