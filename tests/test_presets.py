"""Presets are whole, and published models have their published number of parameters."""

import math

import jax
import pytest
from flax import nnx

from moe_jax.errors import InputError
from moe_jax.presets import PRESETS, get_preset
from moe_jax.train_step import model_parts


@pytest.mark.parametrize("name", PRESETS)
def test_presets_check(name):
  assert get_preset(name).check() is PRESETS[name]


def test_unknown_preset():
  with pytest.raises(InputError, match="unknown preset 'mixtral': did you mean mixtral_8x7b"):
    get_preset("mixtral")


def test_mixtral_has_its_parameters():
  params = jax.eval_shape(lambda: model_parts(PRESETS["mixtral_8x7b"], 32_000)[1])
  sizes = {path[-1]: math.prod(v.get_value().shape) for path, v in nnx.to_flat_state(params)}
  assert sum(math.prod(v.get_value().shape) for _, v in nnx.to_flat_state(params)) == 46_702_792_704
  assert sizes["w_gate_EDF"] == 32 * 8 * 4096 * 14336
