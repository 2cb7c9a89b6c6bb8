"""Values of a config.json: what stands for rotary positions, and types that are wrong."""

import pytest

from moe_jax.errors import InputError
from moe_jax.interop.families import FAMILIES, Values
from tests.interop.test_families import CASES

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}


def read(name, **fields):
  return FAMILIES[name].read(Values("config.json", CASES[name][0] | fields))


def rope(**fields):
  return Values("config.json", {"rope_theta": 7.0} | fields).rope


def test_rope_scaling_stands_in_place_of_rope_parameters():
  """As in transformers, where the README of a model says to add rope_scaling to what version 5 wrote."""
  default = {"rope_type": "default", "rope_theta": 7.0}
  assert rope(rope_parameters=default, rope_scaling=YARN) == YARN | {"rope_theta": 7.0}
  assert rope(rope_parameters=YARN, rope_scaling={"type": "default"}) == default
  assert (
    rope(rope_parameters=YARN, rope_scaling={}) == rope(rope_parameters=YARN) == YARN | {"rope_theta": 7.0}
  )
  with pytest.raises(InputError, match="rope_type='yarn' is not supported for this model"):
    read("qwen3_moe", rope_parameters={"rope_type": "default"}, rope_scaling=YARN)


def test_a_base_that_would_be_lost():
  fields = {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}, "rope_scaling": YARN}
  lost = r"rope_parameters has rope_theta=50.0, and rope_scaling, which is read in its place, has 7.0; put the right"
  with pytest.raises(InputError, match=f"^config.json: {lost} rope_theta into rope_scaling$"):
    rope(**fields)
  assert rope(**fields | {"rope_scaling": YARN | {"rope_theta": 50.0}})["rope_theta"] == 50.0


BOOLEANS = {
  "qwen3_moe": ["norm_topk_prob", "tie_word_embeddings"],
  "qwen2_moe": ["norm_topk_prob", "qkv_bias"],
  "olmoe": ["norm_topk_prob"],
  "deepseek": ["norm_topk_prob", "seq_aux"],
  "deepseek_v3": ["norm_topk_prob", "rope_interleave"],
  "gpt_oss": ["attention_bias"],
}


@pytest.mark.parametrize(("family", "name"), [(f, name) for f, names in BOOLEANS.items() for name in names])
@pytest.mark.parametrize("value", ["false", "no", 0, []])
def test_only_true_and_false_are_so(family, name, value):
  assert read(family, **{name: True}) and read(family, **{name: False})
  with pytest.raises(InputError) as error:
    read(family, **{name: value})
  assert str(error.value) == f"config.json: {name}={value!r}: must be true or false"


def test_truncate_of_yarn_is_true_or_false():
  right = "config.json: rope: truncate='false': must be true or false"
  with pytest.raises(InputError, match=right):
    read("gpt_oss", rope_parameters=None, rope_scaling=YARN | {"truncate": "false"})
