"""Fields that the config.json of most families have in common, in both directions."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from moe_jax.config import BlockConfig, ModelConfig, Segment
from moe_jax.errors import InputError
from moe_jax.interop.families.base import Values
from moe_jax.ops.balancing.conventions import convert
from moe_jax.registry import Method


def read_core(values: Values) -> dict[str, Any]:
  """Returns the fields of a `ModelConfig` that have the same name in every family.

  rope_theta and rms_norm_eps must be there, see `Values.assuming`: every family has its own.
  """
  values.must_be("hidden_act", "silu")
  heads, dim = values("num_attention_heads"), values("hidden_size")
  return {
    "num_layers": values("num_hidden_layers"),
    "model_dim": dim,
    "num_heads": heads,
    "num_kv_heads": values("num_key_value_heads", heads),
    "head_dim": values("head_dim", dim // heads),
    "rope_theta": float(values.rope["rope_theta"]),
    "norm_eps": values("rms_norm_eps"),
    "tie_embeddings": values.boolean("tie_word_embeddings", False),
    "compute_dtype": values.compute_dtype,
  }


def write_core(config: ModelConfig) -> dict[str, Any]:
  """The inverse of `read_core`."""
  return {
    "hidden_act": "silu",
    "num_hidden_layers": sum(segment.repeats * len(segment.pattern) for segment in config.blocks),
    "hidden_size": config.model_dim,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "rope_theta": config.rope_theta,
    "rms_norm_eps": config.norm_eps,
    "tie_word_embeddings": config.tie_embeddings,
  }


def layers_of(config: ModelConfig) -> list[BlockConfig]:
  """Returns the block of every layer."""
  return [block for segment in config.blocks for _ in range(segment.repeats) for block in segment.pattern]


def with_layers(layers: Sequence[BlockConfig]) -> tuple[Segment, ...]:
  """Returns segments for these layers: the shortest pattern that repeats over all, or a segment for each run."""
  for size in range(1, len(layers) // 2 + 1):
    if len(layers) % size == 0 and list(layers) == list(layers[:size]) * (len(layers) // size):
      return (Segment(tuple(layers[:size]), len(layers) // size),)
  runs: list[Segment] = []
  for block in layers:
    if runs and runs[-1].pattern == (block,):
      runs[-1] = Segment((block,), runs[-1].repeats + 1)
    else:
      runs.append(Segment((block,)))
  return tuple(runs)


def sparse_layers(
  config: dict[str, Any], is_sparse: Sequence[bool], mixer: str = "attention"
) -> dict[str, Any]:
  """Returns `config` with the fields that say which layers have experts."""
  if not any(is_sparse):
    raise InputError("config.json: no layer has experts")
  num_layers, dense_first = len(is_sparse), list(is_sparse).index(True)
  for every in range(1, num_layers - dense_first + 1):
    expected = [
      layer >= 0 and (layer + 1) % every == 0 for layer in range(-dense_first, num_layers - dense_first)
    ]
    if (num_layers - dense_first) % every == 0 and list(is_sparse) == expected:
      return config | {"num_dense_first": dense_first, "moe_every": every, "mixer": mixer}
  blocks = [BlockConfig(mixer=mixer, ffn="moe" if sparse else "mlp") for sparse in is_sparse]
  return {k: v for k, v in config.items() if k != "num_layers"} | {"segments": with_layers(blocks)}


def loss_of(coefficient: float, num_experts: int, num_experts_per_token: int, num_layers: int) -> str:
  """Returns the balancer for `router_aux_loss_coef`: transformers pools the tokens of all layers, and here layers add up."""
  if not coefficient:
    return "none"
  return f"switch_loss:{_weight(coefficient, num_experts, num_experts_per_token, num_layers)}"


def _weight(coefficient: float, *sizes: int) -> float:
  """Has six digits, as in the presets, if the coefficient has five or fewer, and otherwise fifteen."""
  digits = 6 if float(f"{coefficient:.5g}") == coefficient else 15
  return float(f"{_converted(coefficient, 'hugging_face', 'moe_jax', *sizes):.{digits}g}")


def _converted(value: float, source: str, target: str, num_experts: int, k: int, num_layers: int) -> float:
  sizes = {"num_experts": num_experts, "num_experts_per_token": k, "num_layers": num_layers}
  return convert(value, source, target, **sizes)


def coefficient_of(config: ModelConfig) -> float:
  """The inverse of `loss_of`, for a resolved configuration. 0 if no balancer is `switch_loss`.

  Of the numbers that `loss_of` makes the same weight of, it is the one with the fewest digits.
  """
  options = switch_loss_of(config, "global_batch")
  if not options:
    return 0.0
  moe, weight = config.moe, options["weight"]
  layers = sum(str(block.ffn) == "moe" for block in layers_of(config))
  sizes = (moe.num_experts, moe.num_experts_per_token, layers)
  whole = _converted(weight, "moe_jax", "hugging_face", *sizes)
  rounded = (float(f"{whole:.{digits}g}") for digits in range(1, 17))
  return next((number for number in rounded if _weight(number, *sizes) == weight), whole)


def switch_loss_of(config: ModelConfig, *scopes: str) -> dict[str, Any] | None:
  """Returns the options of the first `switch_loss` with one of these scopes, or else of the first one, or None."""
  found = [options for method in config.moe.balancers if (options := options_of(method, "switch_loss"))]
  return next((options for options in found if options["scope"] in scopes), found[0] if found else None)


def options_of(method: Any, name: str) -> dict[str, Any] | None:
  """Returns the options of a resolved method if it is the one of that name, and otherwise None."""
  return dict(method.options) if isinstance(method, Method) and method.name == name else None


def shared_moe(config: ModelConfig) -> ModelConfig:
  """Returns `config` with the MoE fields of its blocks with experts as its own, for what reads `config.moe`."""
  of_blocks = [block.moe for block in layers_of(config) if str(block.ffn) == "moe"]
  return dataclasses.replace(config, moe=of_blocks[0]) if of_blocks else config
