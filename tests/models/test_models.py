"""Published models have their published number of parameters, and every preset the number that its sizes give."""

import math

import pytest
from flax import nnx

from moe_jax.config import ModelConfig
from moe_jax.errors import InputError
from moe_jax.models import PRESETS, VOCAB_SIZES, preset
from moe_jax.training.compiled import abstract_model, resolve_config


def sizes_of(name: str, vocab_size: int) -> dict[str, int]:
  """Parameters by the name of their variable, all layers together, without computing any."""
  params = nnx.state(abstract_model(resolve_config(PRESETS[name]), vocab_size), nnx.Param)
  sizes = {}
  for path, variable in nnx.to_flat_state(params):
    sizes[path[-1]] = sizes.get(path[-1], 0) + math.prod(variable.get_value().shape)
  return sizes


def parameters_by_hand(model: ModelConfig, vocab_size: int) -> int:
  """Layer by layer: attention, two norms, and either experts with their router or one dense block."""
  d, moe, total = model.model_dim, model.moe, 0
  matrices_of = {"swiglu": 3, "relu": 2}
  for layer in range(1, model.num_layers + 1):
    total += 2 * d + (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim * d
    total += 2 * model.head_dim if model.qk_norm else 0
    if layer % model.moe_every:
      total += matrices_of[model.activation] * d * model.dense_dim
    else:
      total += d * moe.num_experts + moe.num_experts * matrices_of[moe.experts] * d * moe.expert_dim
  return total + d + 2 * d * vocab_size


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_parameters_that_their_sizes_give(name):
  config = preset(name).check()
  found = sum(sizes_of(name, VOCAB_SIZES[name]).values())
  assert found == parameters_by_hand(config.model, VOCAB_SIZES[name])


def test_unknown_preset():
  with pytest.raises(InputError, match="unknown preset 'mixtral': did you mean mixtral_8x7b"):
    preset("mixtral")


@pytest.mark.parametrize(
  ("name", "vocab_size", "parameters"),
  [
    ("mixtral_8x7b", 32_000, 46_702_792_704),
    ("mixtral_8x22b", 32_000, 140_620_634_112),
    ("mixtral_8x22b", 32_768, 140_630_071_296),
    ("qwen3_30b_a3b", 151_936, 30_532_122_624),
  ],
)
def test_published_models_have_their_parameters(name, vocab_size, parameters):
  assert parameters_by_hand(PRESETS[name].model, vocab_size) == parameters
  assert sum(sizes_of(name, vocab_size).values()) == parameters


@pytest.mark.parametrize(
  ("name", "experts", "width", "hidden", "total"),
  # totals: 2006.16668, table 1, and 2101.03961, table 9, in billions
  [("gshard_600b_like", 18 * 2048, 1024, 8192, 619), ("switch_c_like", 30 * 2048, 2080, 6144, 1571)],
)
def test_decoders_like_published_ones_have_their_experts(name, experts, width, hidden, total):
  sizes = sizes_of(name, VOCAB_SIZES[name])
  assert sizes["w_up_EDF"] == sizes["w_down_EFD"] == experts * width * hidden
  assert sum(sizes.values()) / 1e9 == pytest.approx(total, rel=0.01)
