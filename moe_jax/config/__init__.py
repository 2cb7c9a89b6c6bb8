"""Configuration: frozen dataclasses. Fields that choose a part hold its name or the object itself.

Every field with a help text is a flag of the experiment scripts, with the same name. `check` raises an
`InputError` that names the first wrong field. This package imports no parts: `moe_jax.nn.build.resolve` turns
names into `Method`s.
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
