"""Presets are complete, and published models have their published number of parameters."""

import math

import jax
import pytest
from flax import nnx

from moe_jax.errors import InputError
from moe_jax.models import PRESETS, VOCAB_SIZES, preset
from moe_jax.nn.methods import check_causal, check_methods
from moe_jax.training.step import model_parts


def sizes_of(name: str, vocab_size: int) -> dict[str, int]:
  """Parameters by the name of their variable, all layers together, without computing any."""
  params = jax.eval_shape(lambda: model_parts(PRESETS[name], vocab_size)[1])
  sizes = {}
  for path, variable in nnx.to_flat_state(params):
    sizes[path[-1]] = sizes.get(path[-1], 0) + math.prod(variable.get_value().shape)
  return sizes


@pytest.mark.parametrize("name", PRESETS)
def test_presets_check(name):
  config = preset(name)
  assert config.check() is PRESETS[name]
  check_methods(config.model.moe)
  check_causal(config.model.moe)
  assert VOCAB_SIZES[name] > 0


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
  assert sum(sizes_of(name, vocab_size).values()) == parameters


def test_mixtral_has_its_experts():
  assert sizes_of("mixtral_8x7b", 32_000)["w_gate_EDF"] == 32 * 8 * 4096 * 14336


@pytest.mark.parametrize(
  ("name", "experts", "width", "hidden", "total"),
  # totals: 2006.16668, table 1, and 2101.03961, table 9, in billions
  [("gshard_600b_like", 18 * 2048, 1024, 8192, 619), ("switch_c_like", 30 * 2048, 2080, 6144, 1571)],
)
def test_decoders_like_published_ones_have_their_experts(name, experts, width, hidden, total):
  sizes = sizes_of(name, VOCAB_SIZES[name])
  assert sizes["w_up_EDF"] == sizes["w_down_EFD"] == experts * width * hidden
  assert sum(sizes.values()) / 1e9 == pytest.approx(total, rel=0.01)
