"""OLMoE (2409.02060)."""

from typing import Any

from moe_jax.config import BlockConfig, ModelConfig, MoEConfig
from moe_jax.interop.families.base import ATTENTION, MODEL, QWEN_EXPERTS, ROUTER, Family, Values, option
from moe_jax.interop.families.fields import (
  coefficient_of,
  layers_of,
  loss_of,
  options_of,
  read_core,
  write_core,
)
from moe_jax.interop.source import Names


def read(values: Values) -> ModelConfig:
  values = values.assuming(rope_theta=10_000.0, rms_norm_eps=1e-5)
  values.must_be("attention_bias", False)
  core = read_core(values)
  num_experts, k = values("num_experts"), values("num_experts_per_tok")
  softmax = "after" if values.boolean("norm_topk_prob", False) else "before"
  return ModelConfig(
    **core | {"rope_theta": values.rope_theta, "qk_norm": True},
    dense_dim=values("intermediate_size"),
    mixer=option("attention", qk_norm_over="projection", clip_qkv=values("clip_qkv", None)),
    moe=MoEConfig(
      num_experts=num_experts,
      num_experts_per_token=k,
      expert_dim=values("intermediate_size"),
      router=f"softmax_topk:softmax={softmax}",
      balancers=loss_of(values("router_aux_loss_coef", 0.0), num_experts, k, core["num_layers"]),
      dispatcher="dropless",
    ),
  )


def write(config: ModelConfig) -> dict[str, Any]:
  moe, options = config.moe, options_of(layers_of(config)[0].mixer, "attention") or {}
  return write_core(config) | {
    "intermediate_size": moe.expert_dim,
    "num_experts": moe.num_experts,
    "num_experts_per_tok": moe.num_experts_per_token,
    "norm_topk_prob": str(moe.router) == "softmax_topk",
    "clip_qkv": options.get("clip_qkv") or None,
    "router_aux_loss_coef": coefficient_of(config),
    "attention_bias": False,
  }


def names(config: ModelConfig, block: BlockConfig) -> Names:
  del config, block
  return {**MODEL, **ATTENTION, **ROUTER, **QWEN_EXPERTS}


OLMOE = Family("olmoe", "OlmoeForCausalLM", read, write, names)
