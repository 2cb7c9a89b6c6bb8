"""How arrays are sharded over a mesh of devices, and the exchange of tokens between devices."""

from moe_jax.sharding.mesh import axis_sizes, check_divides, compiler_options, make_mesh
from moe_jax.sharding.rules import (
  BATCH_AXES,
  KEPT_IN_PARTS,
  MESH_AXES,
  RULES,
  batch_sharding,
  constrain,
  gathered,
  in_use,
  num_parts,
  on_one_cpu,
  partition_spec,
  platform,
  replicated,
  state_shardings,
)

__all__ = [
  "BATCH_AXES",
  "KEPT_IN_PARTS",
  "MESH_AXES",
  "RULES",
  "axis_sizes",
  "batch_sharding",
  "check_divides",
  "compiler_options",
  "constrain",
  "gathered",
  "in_use",
  "make_mesh",
  "num_parts",
  "on_one_cpu",
  "partition_spec",
  "platform",
  "replicated",
  "state_shardings",
]
