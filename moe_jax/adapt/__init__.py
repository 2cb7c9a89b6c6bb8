"""Model in, model out: what is done to a trained model. Every function takes a `Transformer` and returns another.

A `Transformer` has its configuration (`model.config`) and its parameters, so adaptations compose, and their results
save (`moe_jax.training.start.save_model`), load and train (`--init_from`) as any other model. See docs/adapt.md.
"""

from moe_jax.adapt.calibrate import calibrate, losses
from moe_jax.adapt.dense import to_dense
from moe_jax.adapt.experts import merge, prune
from moe_jax.adapt.inputs import expert_inputs
from moe_jax.adapt.layers import drop_mtp
from moe_jax.adapt.quantise import dequantise, expert_bytes, quantise
from moe_jax.adapt.tasks import to_task_level
from moe_jax.adapt.upcycle import check_upcycle, upcycle
from moe_jax.adapt.wrappers import (
  ADAPTABLE,
  add_adapters,
  change_moe,
  merge_adapters,
  set_dropout,
  unwrap_experts,
  wrap_experts,
)

__all__ = [
  "ADAPTABLE",
  "add_adapters",
  "calibrate",
  "change_moe",
  "check_upcycle",
  "dequantise",
  "drop_mtp",
  "expert_bytes",
  "expert_inputs",
  "losses",
  "merge",
  "merge_adapters",
  "prune",
  "quantise",
  "set_dropout",
  "to_dense",
  "to_task_level",
  "unwrap_experts",
  "upcycle",
  "wrap_experts",
]
