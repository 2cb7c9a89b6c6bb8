"""gpt-oss (2508.10925): 20b and 120b."""

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
from moe_jax.interop.families.rope import read_rope, write_rope
from moe_jax.interop.source import Names, source

_YARN = {
  "rope_type": "yarn",
  "factor": 32.0,
  "original_max_position_embeddings": 4096,
  "truncate": False,
}
_WINDOW, _FULL = "sliding_attention", "full_attention"


def read(values: Values) -> ModelConfig:
  values = _positions(values.assuming(rope_theta=150_000.0, rms_norm_eps=1e-5, sliding_window=128))
  core = read_core(values)
  num_layers = core.pop("num_layers")
  num_experts = values("num_local_experts")
  k = values.first_of("num_experts_per_tok", "experts_per_token")
  bias = values.boolean("attention_bias", True)
  mixer = {"qkv_bias": bias, "out_bias": bias, "sinks": True} | read_rope(values, scales_scores=False)
  of_type = {
    _FULL: BlockConfig(option("attention", **mixer)),
    _WINDOW: BlockConfig(option("attention", window=values("sliding_window", 0), **mixer)),
  }
  types = values("layer_types", [_FULL if layer % 2 else _WINDOW for layer in range(num_layers)])
  if unknown := sorted(set(types) - of_type.keys()):
    raise InputError(
      f"{values.where}: layer_types has {unknown[0]!r}, and only {_WINDOW} and {_FULL} are supported"
    )
  return ModelConfig(
    **core,
    dense_dim=values("intermediate_size"),
    segments=with_layers([of_type[kind] for kind in types]),
    moe=MoEConfig(
      num_experts=num_experts,
      num_experts_per_token=k,
      expert_dim=values("intermediate_size"),
      router="gpt_oss_topk",
      experts=option(
        "clipped_swiglu", alpha=values("swiglu_alpha", 1.702), limit=values("swiglu_limit", 7.0)
      ),
      balancers=loss_of(values("router_aux_loss_coef", 0.0), num_experts, k, num_layers),
      dispatcher="dropless",
    ),
  )


def _positions(values: Values) -> Values:
  """With YaRN where nothing is said of positions, as in transformers.

  `moe_jax.save` once wrote nothing where positions are not scaled. These files have `swiglu_alpha`, which no release
  has, and which transformers writes together with its positions.
  """
  if any(values.values.get(name) for name in ("rope_parameters", "rope_scaling", "swiglu_alpha")):
    return values
  return Values(values.where, dict(values.values) | {"rope_parameters": None, "rope_scaling": _YARN})


def write(config: ModelConfig) -> dict[str, Any]:
  moe = config.moe
  mixers = [options_of(block.mixer, "attention") or {} for block in layers_of(config)]
  experts = options_of(moe.experts, "clipped_swiglu")
  if experts is None or not all(mixers):
    raise InputError("experts are clipped_swiglu and mixers are attention")
  windows = {options["window"] for options in mixers} - {0}
  return (
    write_core(config)
    | (write_rope(mixers[0]) or {"rope_scaling": {"rope_type": "default"}})
    | {
      "intermediate_size": moe.expert_dim,
      "num_local_experts": moe.num_experts,
      "num_experts_per_tok": moe.num_experts_per_token,
      "experts_per_token": moe.num_experts_per_token,
      "swiglu_alpha": experts["alpha"],
      "swiglu_limit": experts["limit"],
      "attention_bias": mixers[0]["qkv_bias"],
      "layer_types": [_WINDOW if options["window"] else _FULL for options in mixers],
      "sliding_window": max(windows, default=128),  # transformers makes the mask also where no layer has it
      "router_aux_loss_coef": coefficient_of(config),
    }
  )


def names(config: ModelConfig, block: BlockConfig) -> Names:
  del config, block
  packed = "mlp.experts.gate_up_proj"

  def half(i: int) -> tuple:
    """Even columns are the gate, odd ones the other factor. In MXFP4 the matrix is transposed."""
    whole = source(packed, "E D (F i) -> E D F", i=(i, 2))
    return whole + source(f"{packed}_blocks", "E (F i) D -> E D F", i=(i, 2))

  down = source("mlp.experts.down_proj", "E F D -> E F D") + source(
    "mlp.experts.down_proj_blocks", "E D F -> E F D"
  )
  return {
    **MODEL,
    **ATTENTION,
    "ffn.router.w_router_DE": source("mlp.router.weight", "E D -> D E"),
    "ffn.router.b_router_E": source("mlp.router.bias", "E -> E"),
    "ffn.experts.w_gate_EDF": half(0),
    "ffn.experts.w_up_EDF": half(1),
    "ffn.experts.w_down_EFD": down,
    "ffn.experts.b_gate_EF": source(f"{packed}_bias", "E (F i) -> E F", i=(0, 2)),
    "ffn.experts.b_up_EF": source(f"{packed}_bias", "E (F i) -> E F", i=(1, 2)),
    "ffn.experts.b_down_ED": source("mlp.experts.down_proj_bias", "E D -> E D"),
  }


GPT_OSS = Family("gpt_oss", "GptOssForCausalLM", read, write, names)
