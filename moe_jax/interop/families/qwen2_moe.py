"""Qwen1.5-MoE-A2.7B and Qwen2-57B-A14B (2407.10671)."""

from typing import Any

from moe_jax.config import BlockConfig, ModelConfig
from moe_jax.interop.families.base import (
  ATTENTION,
  MODEL,
  QWEN_EXPERTS,
  ROUTER,
  Family,
  Values,
  option,
  swiglu,
)
from moe_jax.interop.families.fields import layers_of, options_of, read_core, sparse_layers, write_core
from moe_jax.interop.families.qwen3_moe import read_moe, sparse, write_moe, write_sparse
from moe_jax.interop.source import Names, source


def read(values: Values) -> ModelConfig:
  values = values.assuming(rope_theta=10_000.0, rms_norm_eps=1e-6)
  values.must_be("use_sliding_window", False)
  fields = read_core(values) | {"rope_theta": values.rope_theta}
  mixer = option("attention", qkv_bias=values.boolean("qkv_bias", True))
  shared = {"num_shared_experts": 1, "shared_expert_gate": True}
  shared["shared_expert_dim"] = values("shared_expert_intermediate_size")
  return ModelConfig(
    **sparse_layers(fields, sparse(values), mixer),
    dense_dim=values("intermediate_size"),
    moe=read_moe(values, **shared),
  )


def write(config: ModelConfig) -> dict[str, Any]:
  moe, options = config.moe, options_of(layers_of(config)[0].mixer, "attention") or {}
  width = moe.shared_width
  own = {"shared_expert_intermediate_size": width, "qkv_bias": options.get("qkv_bias", False)}
  return write_core(config) | write_sparse(config) | write_moe(config) | own


def names(config: ModelConfig, block: BlockConfig) -> Names:
  del config, block
  shared = swiglu("ffn.shared", "mlp.shared_expert")
  gate = source("mlp.shared_expert_gate.weight", "i D -> D", i=(0, 1))
  own = {**swiglu("ffn", "mlp"), **shared, "ffn.shared.w_shared_gate_D": gate}
  return {**MODEL, **ATTENTION, **ROUTER, **QWEN_EXPERTS, **own}


QWEN2_MOE = Family("qwen2_moe", "Qwen2MoeForCausalLM", read, write, names)
