"""A model taken apart and put together is the same model, whatever its blocks."""

import dataclasses

import numpy as np
import pytest

from moe_jax.adapt import add_adapters, drop_mtp
from moe_jax.adapt.layers import as_segments, put_together, take_apart
from moe_jax.config import BlockConfig
from moe_jax.errors import InputError
from tests.adapt import models
from tests.adapt.models import hashes, logits

MTP = dataclasses.replace(models.CONFIG, mtp_depth=1)
MIXED = dataclasses.replace(models.CONFIG, num_layers=5, num_dense_first=1, moe_every=2)


@pytest.mark.parametrize("config", [models.CONFIG, MIXED, MTP], ids=["moe", "mixed", "mtp"])
def test_a_model_put_together_again_is_the_same(config):
  model = models.model(config)
  again = put_together(take_apart(model))
  assert again.config == model.config and hashes(again) == hashes(model)


def test_layers_are_in_the_order_of_the_model():
  parts = take_apart(models.model(MIXED))
  assert ["ffn.w_up_DF" in layer.values for layer in parts.layers] == [True, True, False, True, False]
  block = models.model(MIXED).segments[1].pattern.blocks[1]
  np.testing.assert_array_equal(parts.layers[4].values["ffn.experts.w_up_EDF"], block.ffn.experts.w_up_EDF[1])


def test_segments_say_each_repeated_pattern_once():
  a, b, c = (BlockConfig(mixer=name) for name in "abc")
  described = lambda blocks: [
    ("".join(x.mixer for x in s.pattern), s.repeats) for s in as_segments(tuple(blocks))
  ]
  assert described([a, a, a]) == [("a", 3)]
  assert described([a, b, c, b, c, b, c]) == [("a", 1), ("bc", 3)]
  assert described([a, b, c]) == [("a", 1), ("b", 1), ("c", 1)]
  assert described([a, a, b, b]) == [("a", 2), ("b", 2)]


def test_modules_of_multi_token_prediction_come_off():
  model = models.model(MTP)
  with pytest.raises(
    InputError, match="mtp_depth=1: the modules of multi-token prediction have the last block"
  ):
    add_adapters(model, rank=2)
  dropped = drop_mtp(model)
  np.testing.assert_array_equal(logits(dropped), logits(model))
  assert hashes(model).items() > hashes(dropped).items() and dropped.config.mtp_depth == 0


def test_a_value_of_another_shape_or_without_a_place_is_refused():
  parts = take_apart(models.model())
  layer = parts.layers[0]
  wrong = layer._replace(values=layer.values | {"ffn.experts.w_up_EDF": np.zeros((8, 4, 4))})
  with pytest.raises(InputError, match="w_up_EDF"):
    put_together(parts._replace(layers=(wrong, wrong)))
  with pytest.raises(InputError, match=r"layer 0: ffn\.extra has no place"):
    put_together(
      parts._replace(
        layers=(layer._replace(values=layer.values | {"ffn.extra": np.zeros(1)}), parts.layers[1])
      )
    )
