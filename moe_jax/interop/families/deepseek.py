"""DeepSeekMoE-16B (2401.06066), V2 and V2-Lite (2405.04434), V3 and R1 (2412.19437), and Kimi K2 (2507.20534)."""

import functools
from typing import Any

from moe_jax.config import BlockConfig, ModelConfig, MoEConfig
from moe_jax.errors import InputError
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
from moe_jax.interop.families.fields import (
  layers_of,
  options_of,
  read_core,
  sparse_layers,
  switch_loss_of,
  write_core,
)
from moe_jax.interop.families.rope import read_rope, write_rope
from moe_jax.interop.source import Names, source

# Of transformers' classes for V2 and V3, and of the classes that come with DeepSeekMoE-16B and Kimi K2.
_DEFAULTS = {"rope_theta": 10_000.0, "rms_norm_eps": 1e-6}


def read_moe_16b(values: Values) -> ModelConfig:
  values = values.assuming(**_DEFAULTS)
  values.must_be("attention_bias", False)
  values.must_be("scoring_func", "softmax")
  core = read_core(values) | {"rope_theta": values.rope_theta}
  softmax = "after" if values.boolean("norm_topk_prob", False) else "before"
  return _model(values, core, "attention", f"softmax_topk:softmax={softmax}", _sequence_loss(values))


def read_v2(values: Values) -> ModelConfig:
  values = values.assuming(**_DEFAULTS)
  values.must_be("norm_topk_prob", False)
  values.must_be("scoring_func", "softmax")
  scale = float(values("routed_scaling_factor", 1.0))
  method = values("topk_method", "greedy")
  groups = (values("n_group"), values("topk_group")) if method == "group_limited_greedy" else (1, 1)
  if method not in ("greedy", "group_limited_greedy"):
    raise InputError(
      f"{values.where}: topk_method={method!r} is not supported, only greedy and group_limited_greedy"
    )
  router = option("device_limited_topk", groups=groups[0], groups_per_token=groups[1], scale=scale)
  if groups[0] == 1 and scale == 1:
    router = "softmax_topk:softmax=before"
  return _model(values, read_core(values), _mla(values, True), router, _sequence_loss(values))


def read_v3(values: Values) -> ModelConfig:
  values = values.assuming(**_DEFAULTS, n_group=8, topk_group=4)
  values.must_be("topk_method", "noaux_tc")
  values.must_be("scoring_func", "sigmoid")
  scale, normalize = float(values("routed_scaling_factor", 2.5)), values.boolean("norm_topk_prob", True)
  groups = {"groups": values("n_group", 1), "groups_per_token": values("topk_group", 1)}
  if groups["groups"] == 1:
    router = option("sigmoid_topk", normalize=normalize, scale=scale)
  elif normalize:
    router = option("node_limited_topk", **groups, scale=scale)
  else:
    router = option("group_limited_topk", **groups, normalize=normalize, scale=scale)
  values.must_be("head_dim", values("qk_rope_head_dim"))  # transformers makes the frequencies of so many
  mixer = _mla(values, values.boolean("rope_interleave", True))
  return _model(values, read_core(values), mixer, router, "loss_free_bias:0.001,sequence_loss:0.0001")


def _sequence_loss(values: Values) -> str:
  """`aux_loss_alpha`, a loss for every sequence unless `seq_aux` is false, as in the released code."""
  alpha = values("aux_loss_alpha", 0.0)
  scope = "sequence" if values.boolean("seq_aux", True) else None
  return option("switch_loss", weight=alpha, scope=scope) if alpha else "none"


def _write_sequence_loss(config: ModelConfig) -> dict[str, Any]:
  """The inverse of `_sequence_loss`."""
  options = switch_loss_of(config, "sequence", "global_batch") or {"weight": 0.0, "scope": "sequence"}
  return {"aux_loss_alpha": options["weight"], "seq_aux": options["scope"] == "sequence"}


def _mla(values: Values, interleaved: bool) -> str:
  values.must_be("attention_bias", False)
  sizes = {
    "query_rank": values("q_lora_rank", 0),
    "kv_rank": values("kv_lora_rank"),
    "nope_dim": values("qk_nope_head_dim"),
    "rope_dim": values("qk_rope_head_dim"),
    "value_dim": values("v_head_dim"),
    "interleaved": interleaved,
  }
  return option("mla", **sizes, **read_rope(values, scales_scores=True))


def _model(values: Values, core: dict[str, Any], mixer: str, router: str, balancers: str) -> ModelConfig:
  values.must_be("moe_layer_freq", 1)
  num_layers, dense = core["num_layers"], values("first_k_dense_replace", 0)
  if mixer.startswith("mla"):  # config.json may have the rotary part as head_dim
    core = core | {"num_kv_heads": core["num_heads"], "head_dim": values("qk_nope_head_dim")}
  return ModelConfig(
    **sparse_layers(core, [layer >= dense for layer in range(num_layers)], mixer),
    dense_dim=values("intermediate_size"),
    moe=MoEConfig(
      num_experts=values("n_routed_experts"),
      num_experts_per_token=values("num_experts_per_tok"),
      expert_dim=values("moe_intermediate_size"),
      num_shared_experts=values("n_shared_experts", 0),
      router=router,
      balancers=balancers,
      dispatcher="dropless",
    ),
  )


def write_moe_16b(config: ModelConfig) -> dict[str, Any]:
  return _write_experts(config) | _write_sequence_loss(config)


def _write_experts(config: ModelConfig) -> dict[str, Any]:
  moe = config.moe
  is_sparse = [str(block.ffn) == "moe" for block in layers_of(config)]
  dense = is_sparse.index(True) if True in is_sparse else 0
  width = moe.shared_expert_dim or moe.expert_dim
  return write_core(config) | {
    "intermediate_size": config.dense_dim,
    "first_k_dense_replace": dense,
    "moe_layer_freq": 1,
    "n_routed_experts": moe.num_experts,
    "num_experts_per_tok": moe.num_experts_per_token,
    "moe_intermediate_size": moe.expert_dim,
    "n_shared_experts": moe.num_shared_experts * width // moe.expert_dim,
    "scoring_func": "softmax",
    "norm_topk_prob": str(moe.router) == "softmax_topk",
    "attention_bias": False,
  }


def _write_mla(config: ModelConfig) -> dict[str, Any]:
  options = options_of(layers_of(config)[0].mixer, "mla")
  if options is None:
    raise InputError("the mixer is mla")
  sizes = mla_sizes(config, options)
  values = _write_experts(config) | write_rope(options)
  return values | {
    "num_key_value_heads": config.num_heads,
    "head_dim": sizes["rope"],  # what transformers computes it to be
    "q_lora_rank": options["query_rank"] or None,
    "kv_lora_rank": sizes["rank"],
    "qk_nope_head_dim": sizes["nope"],
    "qk_rope_head_dim": sizes["rope"],
    "v_head_dim": sizes["value"],
    "rope_interleave": options["interleaved"],
  }


def mla_sizes(config: ModelConfig, options: dict[str, Any]) -> dict[str, int]:
  """Returns the widths of latent attention, with those that are 0 replaced as `MLA` does."""
  h = config.head_dim
  return {
    "rank": options["kv_rank"] or 4 * h,
    "nope": options["nope_dim"] or h,
    "rope": options["rope_dim"] or h // 2,
    "value": options["value_dim"] or h,
  }


def write_v2(config: ModelConfig) -> dict[str, Any]:
  values = _write_mla(config) | _write_sequence_loss(config)
  values |= {"norm_topk_prob": False, "topk_method": "greedy"}
  limited = options_of(config.moe.router, "device_limited_topk")
  if limited is None:
    return values | {"routed_scaling_factor": 1.0}
  groups = {"n_group": limited["groups"], "topk_group": limited["groups_per_token"]}
  return values | groups | {"routed_scaling_factor": limited["scale"], "topk_method": "group_limited_greedy"}


def write_v3(config: ModelConfig) -> dict[str, Any]:
  values = _write_mla(config) | {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
  router = config.moe.router
  options = {"groups": 1, "groups_per_token": 1, "normalize": True, "scale": 1.0} | dict(router.options)
  return values | {
    "n_group": options["groups"],
    "topk_group": options["groups_per_token"],
    "norm_topk_prob": options["normalize"],
    "routed_scaling_factor": options["scale"],
    "num_nextn_predict_layers": config.mtp_depth,
  }


def names_moe_16b(config: ModelConfig, block: BlockConfig) -> Names:
  del config, block
  dense = {**swiglu("ffn", "mlp"), **swiglu("ffn.shared", "mlp.shared_experts")}
  return {**MODEL, **ATTENTION, **ROUTER, **QWEN_EXPERTS, **dense}


def names_mla(config: ModelConfig, block: BlockConfig) -> Names:
  sizes = mla_sizes(config, options_of(block.mixer, "mla"))
  rank, rope, nope, value = (sizes[name] for name in ("rank", "rope", "nope", "value"))
  low = "self_attn.kv_a_proj_with_mqa.weight"
  up = "self_attn.kv_b_proj.weight"
  mla = {
    "mixer.w_query_DNH": source("self_attn.q_proj.weight", "(N H) D -> D N H"),
    "mixer.w_query_down_DX": source("self_attn.q_a_proj.weight", "X D -> D X"),
    "mixer.query_norm.scale_D": source("self_attn.q_a_layernorm.weight", "D -> D"),
    "mixer.w_query_up_XNH": source("self_attn.q_b_proj.weight", "(N H) X -> X N H"),
    "mixer.w_kv_down_DX": source(low, "X D -> D X", X=(0, rank + rope)),
    "mixer.w_key_rope_DH": source(low, "H D -> D H", H=(rank, rank + rope)),
    "mixer.kv_norm.scale_D": source("self_attn.kv_a_layernorm.weight", "D -> D"),
    "mixer.w_key_up_XNH": source(up, "(N H) X -> X N H", H=(0, nope + value)),
    "mixer.w_value_up_XNH": source(up, "(N H) X -> X N H", H=(nope, nope + value)),
    "mixer.w_out_NHD": source("self_attn.o_proj.weight", "D (N H) -> N H D"),
  }
  return names_moe_16b(config, block) | mla


def _mtp_depth(values: Values) -> int:
  return values("num_nextn_predict_layers", values("num_mtp_layers", 0))


def _copies(config: ModelConfig) -> dict[str, str]:
  """Every module of multi-token prediction has the embedding and the output matrix, too."""
  first = len(layers_of(config))
  modules = [f"model.layers.{first + i}" for i in range(config.mtp_depth)]
  embeddings = {f"{module}.embed_tokens.weight": "model.embed_tokens.weight" for module in modules}
  head = "model.embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"
  return embeddings | {f"{module}.shared_head.head.weight": head for module in modules}


def names_v3(config: ModelConfig, block: BlockConfig) -> Names:
  join = "eh_proj.weight"  # its first half multiplies the embedding, its second half the hidden state
  return names_mla(config, block) | {
    "ffn.balancer_state": source("mlp.gate.e_score_correction_bias", "E -> E"),
    "successor.embedding_norm.scale_D": source("enorm.weight", "D -> D"),
    "successor.hidden_norm.scale_D": source("hnorm.weight", "D -> D"),
    "successor.final_norm.scale_D": source("shared_head.norm.weight", "D -> D"),
    "successor.w_join_2DX": source(join, "X (i D) -> D X", index=0, i=(1, 2))
    + source(join, "X (i D) -> D X", index=1, i=(0, 2)),
  }


_v3 = functools.partial(
  Family,
  read=read_v3,
  write=write_v3,
  names=names_v3,
  mtp_depth=_mtp_depth,
  copies=_copies,
  float32=("mlp.gate.e_score_correction_bias", "mlp.gate.weight"),
)
DEEPSEEK_MOE_16B = Family("deepseek", "DeepseekForCausalLM", read_moe_16b, write_moe_16b, names_moe_16b)
DEEPSEEK_V2 = Family("deepseek_v2", "DeepseekV2ForCausalLM", read_v2, write_v2, names_mla)
DEEPSEEK_V3 = _v3("deepseek_v3", "DeepseekV3ForCausalLM")
KIMI_K2 = _v3("kimi_k2", "DeepseekV3ForCausalLM")
