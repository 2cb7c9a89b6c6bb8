"""Qwen3-MoE (2505.09388): 30B-A3B and 235B-A22B."""

from typing import Any

from moe_jax.config import BlockConfig, ModelConfig, MoEConfig
from moe_jax.interop.families.base import ATTENTION, MODEL, QWEN_EXPERTS, ROUTER, Family, Values, swiglu
from moe_jax.interop.families.fields import (
  coefficient_of,
  layers_of,
  loss_of,
  read_core,
  sparse_layers,
  write_core,
)
from moe_jax.interop.source import Names


def read(values: Values) -> ModelConfig:
  values = values.assuming(rope_theta=10_000.0, rms_norm_eps=1e-6)
  values.must_be("use_sliding_window", False)
  values.must_be("attention_bias", False)
  fields = read_core(values) | {"rope_theta": values.rope_theta, "qk_norm": True}
  fields = sparse_layers(fields, sparse(values))
  return ModelConfig(**fields, dense_dim=values("intermediate_size"), moe=read_moe(values))


def sparse(values: Values) -> list[bool]:
  """Returns which layers have experts, by `decoder_sparse_step` and `mlp_only_layers`."""
  step, dense = values("decoder_sparse_step", 1), values("mlp_only_layers", [])
  layers = range(values("num_hidden_layers"))
  return [layer not in dense and (layer + 1) % step == 0 for layer in layers]


def read_moe(values: Values, **fields: Any) -> MoEConfig:
  """Returns the routed experts of Qwen's models. `fields` are further ones."""
  num_experts, k = values.first_of("num_experts", "num_local_experts"), values("num_experts_per_tok")
  softmax = "after" if values.boolean("norm_topk_prob", False) else "before"
  return MoEConfig(
    num_experts=num_experts,
    num_experts_per_token=k,
    expert_dim=values("moe_intermediate_size"),
    router=f"softmax_topk:softmax={softmax}",
    balancers=loss_of(values("router_aux_loss_coef", 0.0), num_experts, k, sum(sparse(values))),
    dispatcher="dropless",
    **fields,
  )


def write(config: ModelConfig) -> dict[str, Any]:
  return write_core(config) | write_sparse(config) | write_moe(config) | {"attention_bias": False}


def write_sparse(config: ModelConfig) -> dict[str, Any]:
  """The inverse of `sparse`."""
  is_sparse = [str(block.ffn) == "moe" for block in layers_of(config)]
  dense = [layer for layer, sparse in enumerate(is_sparse) if not sparse]
  return {"decoder_sparse_step": 1, "mlp_only_layers": dense, "intermediate_size": config.dense_dim}


def write_moe(config: ModelConfig) -> dict[str, Any]:
  """The inverse of `read_moe`."""
  moe = config.moe
  return {
    "num_experts": moe.num_experts,
    "num_experts_per_tok": moe.num_experts_per_token,
    "moe_intermediate_size": moe.expert_dim,
    "norm_topk_prob": str(moe.router) == "softmax_topk",
    "router_aux_loss_coef": coefficient_of(config),
  }


def names(config: ModelConfig, block: BlockConfig) -> Names:
  del config, block
  return {**MODEL, **ATTENTION, **ROUTER, **QWEN_EXPERTS, **swiglu("ffn", "mlp")}


QWEN3_MOE = Family("qwen3_moe", "Qwen3MoeForCausalLM", read, write, names)
