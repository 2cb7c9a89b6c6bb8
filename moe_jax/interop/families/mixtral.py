"""Mixtral (2401.04088)."""

from typing import Any

from moe_jax.config import BlockConfig, ModelConfig, MoEConfig
from moe_jax.interop.families.base import ATTENTION, MODEL, Family, Values, experts, option
from moe_jax.interop.families.fields import (
  coefficient_of,
  layers_of,
  loss_of,
  options_of,
  read_core,
  write_core,
)
from moe_jax.interop.source import Names, source


def read(values: Values) -> ModelConfig:
  values = values.assuming(rope_theta=1e6, rms_norm_eps=1e-5)
  values.must_be("router_jitter_noise", 0.0)  # there it also changes what the experts read
  core = read_core(values)
  num_experts, k = values("num_local_experts"), values("num_experts_per_tok")
  theta, window = values.rope_theta, values("sliding_window", 0)
  return ModelConfig(
    **core | {"rope_theta": theta},
    dense_dim=values("intermediate_size"),
    mixer=option("attention", window=window or None),
    moe=MoEConfig(
      num_experts=num_experts,
      num_experts_per_token=k,
      expert_dim=values("intermediate_size"),
      router="softmax_topk:softmax=after",
      balancers=loss_of(values("router_aux_loss_coef", 0.0), num_experts, k, core["num_layers"]),
      dispatcher="dropless",
    ),
  )


def write(config: ModelConfig) -> dict[str, Any]:
  moe = config.moe
  window = (options_of(layers_of(config)[0].mixer, "attention") or {}).get("window", 0)
  return write_core(config) | {
    "intermediate_size": moe.expert_dim,
    "num_local_experts": moe.num_experts,
    "num_experts_per_tok": moe.num_experts_per_token,
    "router_aux_loss_coef": coefficient_of(config),
    "sliding_window": window or None,
  }


def names(config: ModelConfig, block: BlockConfig) -> Names:
  del config, block
  return {**MODEL, **ATTENTION, **MIXTRAL_EXPERTS}


MIXTRAL_EXPERTS: Names = {
  **experts("block_sparse_moe.experts", "w1", "w3", "w2"),
  "ffn.router.w_router_DE": source("block_sparse_moe.gate.weight", "E D -> D E")
  + source("mlp.gate.weight", "E D -> D E"),
}
MIXTRAL = Family("mixtral", "MixtralForCausalLM", read, write, names)
