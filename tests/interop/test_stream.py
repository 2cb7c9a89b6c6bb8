"""A checkpoint read layer by layer computes what the whole model does."""

import dataclasses
import tracemalloc

import jax
import numpy as np
import pytest
from flax import nnx

import moe_jax
from moe_jax.errors import InputError
from moe_jax.interop import memory, place
from moe_jax.interop.families import FAMILIES, Values
from moe_jax.interop.stream import LayerStream
from moe_jax.nn.context import Context
from tests.interop.helpers import MIXTRAL, random_model, traced_memory
from tests.interop.test_families import CASES, V


@pytest.mark.parametrize("name", ["deepseek_v3", "minimax"])
def test_layers_one_by_one_are_the_model(name, tmp_path):
  """Dense and sparse layers, a bias, two kinds of attention, of which one depends on the number of the layer."""
  model = random_model(FAMILIES[name].read(Values("config.json", CASES[name][0])), V)
  moe_jax.save(model, tmp_path)
  rng = np.random.default_rng(0)
  mask_BL = np.arange(6)[None] < np.array([[6], [4]])
  batches = [(rng.integers(0, V, (2, 6)), Context(mask_BL=mask_BL, record_logits=True)) for _ in range(2)]
  stream, seen = LayerStream(tmp_path), {}
  hidden = stream.forward(batches, lambda layer, i, aux: seen.update({(layer, i): aux}))
  assert stream.num_layers == 2 and seen.keys() == {(layer, i) for layer in range(2) for i in range(2)}
  whole = jax.jit(lambda tokens_BL: model(tokens_BL, Context(mask_BL=mask_BL, record_logits=True)))
  for i, (tokens_BL, _) in enumerate(batches):
    logits_BLV, aux = whole(tokens_BL)
    np.testing.assert_allclose(stream.logits(hidden[i]), logits_BLV, rtol=1e-5, atol=1e-5)
    expected = [
      jax.tree.map(lambda x, r=r: x[r], block.ffn) for segment in aux for block in segment for r in range(1)
    ]
    for layer, ffn in enumerate(expected):
      found = seen[layer, i].ffn
      assert (ffn is None) == (found is None)
      if ffn is not None:
        np.testing.assert_array_equal(found.selected_BLE, ffn.selected_BLE)


def test_only_one_layer_is_in_memory(tmp_path, monkeypatch):
  config = dataclasses.replace(MIXTRAL, num_layers=8, model_dim=64)
  config = dataclasses.replace(config, moe=dataclasses.replace(MIXTRAL.moe, expert_dim=2048))
  moe_jax.save(random_model(config), tmp_path)
  batches = [(np.zeros((1, 4), int), Context())]
  LayerStream(tmp_path).forward(batches, lambda *seen: None)  # what Python and JAX keep
  stream = LayerStream(tmp_path)
  layers = [sum(x.nbytes for x in jax.tree.leaves(nnx.state(block))) for _, block in stream.blocks()]
  assert len(layers) == 8
  monkeypatch.setattr(place, "_aligned", traced_memory)
  tracemalloc.start()
  stream.forward(batches, lambda *seen: None)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert 6_000_000 < layers[0] < peak < 1.9 * layers[0]  # two would be 2.2


def test_a_layer_that_does_not_fit_is_said_before_anything_is_read(tmp_path, monkeypatch):
  moe_jax.save(random_model(MIXTRAL), tmp_path)
  # q, k, v and o, two norms, the router, and four experts with three matrices
  layer = 4 * (2 * 16 * 16 + 2 * 16 * 8 + 2 * 16 + 16 * 4 + 4 * 3 * 16 * 24)
  activations = 4 * 6 * 16
  have = lambda free: monkeypatch.setattr(memory, "_free_on_host", lambda: free)
  have(layer - 1)
  with pytest.raises(
    InputError, match=rf"^{tmp_path}: the largest layer needs 0.0 GB in float32, and this host"
  ):
    LayerStream(tmp_path)
  have(layer + activations - 1)
  stream, batches = LayerStream(tmp_path), [(np.zeros((2, 3), int), Context())]
  monkeypatch.setattr(LayerStream, "_load", lambda *args: pytest.fail("something was read"))
  with pytest.raises(
    InputError,
    match=r"the largest layer beside the activations of 6 tokens needs .*; or fewer or shorter batches$",
  ):
    stream.forward(batches, lambda *seen: None)
  have(layer + activations)
  with pytest.raises(pytest.fail.Exception, match="something was read"):
    stream.forward(batches, lambda *seen: None)


def test_a_run_is_not_streamed(tmp_path):
  (tmp_path / "config.json").write_text('{"vocab_size": 3}')
  with pytest.raises(
    InputError, match=r"is a run; moe_jax.save makes a checkpoint of it, which can be streamed"
  ):
    LayerStream(tmp_path)
