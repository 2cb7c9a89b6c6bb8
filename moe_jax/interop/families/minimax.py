"""MiniMax-Text-01 (2501.08313)."""

from typing import Any

from moe_jax.config import BlockConfig, ModelConfig, MoEConfig
from moe_jax.errors import InputError
from moe_jax.interop.families.base import ATTENTION, MODEL, Family, Values, option
from moe_jax.interop.families.fields import (
  coefficient_of,
  layers_of,
  loss_of,
  options_of,
  read_core,
  with_layers,
  write_core,
)
from moe_jax.interop.families.mixtral import MIXTRAL_EXPERTS
from moe_jax.interop.source import Names, Source, source

_LIGHTNING, _SOFTMAX = "linear_attention", "full_attention"


def read(values: Values) -> ModelConfig:
  values = values.assuming(rope_theta=1e6, rms_norm_eps=1e-5)
  values.must_be("router_jitter_noise", 0.0)
  core = read_core(values) | {"rope_theta": values.rope_theta}
  num_layers, head_dim = core.pop("num_layers"), core["head_dim"]
  # transformers rotates the whole head, and MiniMax-01 half of it, as its paper says
  rotary = values("rotary_dim", head_dim // 2) / head_dim
  of_type = {
    _SOFTMAX: BlockConfig(
      option("attention", rotary_fraction=rotary, window=values("sliding_window", 0) or None),
      residual=_residual(values, "full_attn"),
    ),
    _LIGHTNING: BlockConfig(
      option("lightning", chunk=values("block_size", 256)), residual=_residual(values, "linear_attn")
    ),
  }
  num_experts, k = values("num_local_experts"), values("num_experts_per_tok")
  return ModelConfig(
    **core,
    dense_dim=values("intermediate_size"),
    segments=with_layers([of_type[kind] for kind in _types(values, num_layers)]),
    moe=MoEConfig(
      num_experts=num_experts,
      num_experts_per_token=k,
      expert_dim=values("intermediate_size"),
      router="softmax_topk:softmax=after",
      balancers=loss_of(values("router_aux_loss_coef", 0.0), num_experts, k, num_layers),
      dispatcher="dropless",
    ),
  )


def _types(values: Values, num_layers: int) -> list[str]:
  """The kind of every layer. The first release has `attn_type_list`, with 1 for softmax attention."""
  first = [_SOFTMAX if kind == 1 else _LIGHTNING for kind in values("attn_type_list", [])]
  alternating = [_LIGHTNING if layer % 2 else _SOFTMAX for layer in range(num_layers)]
  types = values("layer_types", first or alternating)
  if set(types) - {_SOFTMAX, _LIGHTNING} or len(types) != num_layers:
    raise InputError(
      f"{values.where}: layer_types must name {_SOFTMAX} or {_LIGHTNING} for each of {num_layers} layers"
    )
  return list(types)


def _residual(values: Values, kind: str) -> str:
  """The residual of a layer. Both of its parts have the same, as in the released model."""
  first = {"full_attn": "full_attention", "linear_attn": "linear_attention", "mlp": "mlp"}

  def factor(part: str, which: str) -> float:
    return float(values(f"{part}_{which}_factor", values(f"layernorm_{first[part]}_{which}", 1)))

  alpha, beta = (factor(kind, which) for which in ("alpha", "beta"))
  if (alpha, beta) != (factor("mlp", "alpha"), factor("mlp", "beta")):
    raise InputError(
      f"{values.where}: {kind}_alpha_factor and mlp_alpha_factor must be equal, and so must the betas"
    )
  return f"normed_input:{alpha}:{beta}"


def write(config: ModelConfig) -> dict[str, Any]:
  moe, layers = config.moe, layers_of(config)
  lightning = [options_of(block.mixer, "lightning") for block in layers]
  softmax = next(
    (o for block in layers if (o := options_of(block.mixer, "attention"))),
    {"rotary_fraction": 0.5, "window": 0},
  )
  residual = options_of(layers[0].residual, "normed_input")
  if residual is None:
    raise InputError("the residual is normed_input")
  factors = {f"{part}_{which}_factor": residual[which] for part in _PARTS for which in ("alpha", "beta")}
  return (
    write_core(config)
    | factors
    | {
      "intermediate_size": moe.expert_dim,
      "num_local_experts": moe.num_experts,
      "num_experts_per_tok": moe.num_experts_per_token,
      "layer_types": [_SOFTMAX if options is None else _LIGHTNING for options in lightning],
      "block_size": next((options["chunk"] for options in lightning if options), 256),
      "sliding_window": softmax["window"] or None,
      "rotary_dim": round(softmax["rotary_fraction"] * config.head_dim),
      "router_aux_loss_coef": coefficient_of(config),
    }
  )


_PARTS = ("full_attn", "linear_attn", "mlp")


def names(config: ModelConfig, block: BlockConfig) -> Names:
  del config
  lightning = options_of(block.mixer, "lightning") is not None
  return {**MODEL, **(LIGHTNING if lightning else ATTENTION), **MIXTRAL_EXPERTS}


def _qkv(i: int) -> tuple[Source]:
  return source("self_attn.qkv_proj.weight", "(N i H) D -> D N H", i=(i, 3))


LIGHTNING: Names = {
  "mixer.w_query_DNH": _qkv(0),
  "mixer.w_key_DNH": _qkv(1),
  "mixer.w_value_DNH": _qkv(2),
  "mixer.w_out_gate_DNH": source("self_attn.output_gate.weight", "(N H) D -> D N H"),
  "mixer.norm.scale_D": source("self_attn.norm.weight", "D -> D"),
  "mixer.w_out_NHD": source("self_attn.out_proj.weight", "D (N H) -> N H D"),
}
# Buffers that follow from the configuration. transformers saves them, too.
_COMPUTED = r"model\.layers\.\d+\.self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay)"

MINIMAX = Family(
  "minimax",
  "MiniMaxForCausalLM",
  read,
  write,
  names,
  skipped=_COMPUTED,
  other_types=("minimax_text_01", "MiniMaxText01"),
)
