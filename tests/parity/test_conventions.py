"""Where transformers has another convention than ours, or another formula than the paper."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest

import moe_jax
from moe_jax.interop.folder import open_folder
from moe_jax.interop.quantised import Blockwise
from moe_jax.interop.safetensors import Pending, write_file
from moe_jax.nn.context import Context
from tests.interop.helpers import assert_same_model
from tests.parity import models, oracles
from tests.parity.models import GQA
from tests.parity.test_checkpoints import CASES, change_config
from tests.reference import decoder


def saved(folder, prefix, fields):
  model = models.build(prefix, **fields)
  model.save_pretrained(folder)
  return model


# Those that transformers gives this loss: what makes their only layer one with experts.
WITH_LOSS = {
  "mixtral": {},
  "qwen3_moe": {"mlp_only_layers": []},
  "olmoe": {},
  "qwen2_moe": {"decoder_sparse_step": 1},
  "gpt_oss": {"layer_types": ["full_attention"]},
  "minimax": {"layer_types": ["full_attention"]},
}


@pytest.mark.parametrize("name", WITH_LOSS)
def test_the_auxiliary_loss_of_one_layer(name, tmp_path):
  """`router_aux_loss_coef` becomes the weight of switch_loss, and `save` writes it back."""
  prefix, fields = CASES[name]
  fields = fields | WITH_LOSS[name]
  fields |= {"num_hidden_layers": 1, "router_aux_loss_coef": 0.02, "output_router_logits": True}
  model = saved(tmp_path, prefix, fields)
  tokens_BL = oracles.torch.tensor(models.TOKENS_BL).long()
  expected = 0.02 * model(tokens_BL, labels=tokens_BL).aux_loss.item()
  loaded = moe_jax.load(tmp_path)
  aux = jax.jit(lambda tokens_BL: loaded.model(tokens_BL, Context(train=True))[1])(models.TOKENS_BL)
  loss = moe_jax.balancing_loss(aux)
  assert expected > 0.01
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  moe_jax.save(loaded, tmp_path / "again")
  assert json.loads((tmp_path / "again/config.json").read_text())["router_aux_loss_coef"] == 0.02


def test_minimax_rotates_half_of_a_head(tmp_path):
  """As the paper and the released code have it (2501.08313, section 2.2). transformers rotates the whole head.

  With `rotary_dim` in config.json the two agree (tests/parity/test_checkpoints.py). Without it, ours is the formula of
  the paper, proven by a loop over the same checkpoint.
  """
  layers = ["linear_attention", "full_attention"]
  prefix, fields = CASES["minimax"]
  fields = {name: value for name, value in fields.items() if name != "rotary_dim"}
  model = saved(tmp_path, prefix, fields | {"num_hidden_layers": 2, "layer_types": layers})
  loaded = moe_jax.load(tmp_path)
  logits_BLV, _ = jax.jit(lambda tokens_BL: loaded.model(tokens_BL))(models.TOKENS_BL)
  with oracles.torch.no_grad():
    theirs_BLV = model(oracles.torch.tensor(models.TOKENS_BL).long()).logits.numpy()
  scale = np.abs(theirs_BLV).max()
  assert np.abs(logits_BLV - theirs_BLV).max() > 0.01 * scale
  for row, tokens_L in enumerate(models.TOKENS_BL):
    expected_LV = minimax(open_folder(tmp_path, {}).tensors, tokens_L, layers, rotary_dim=4)
    np.testing.assert_allclose(logits_BLV[row], expected_LV, rtol=0, atol=2e-5 * scale)
    whole_LV = minimax(open_folder(tmp_path, {}).tensors, tokens_L, layers, rotary_dim=8)
    np.testing.assert_allclose(theirs_BLV[row], whole_LV, rtol=0, atol=2e-5 * scale)


def minimax(tensors, tokens_L, layers, rotary_dim):
  """MiniMax-01 as a loop: the residual is the normed input, alpha 1.5, beta 0.8; K = 2, weights renormalised."""
  w = lambda name: np.asarray(tensors[name], np.float64)
  heads, theta = GQA["num_attention_heads"], 1e6
  x_LD = w("model.embed_tokens.weight")[tokens_L]
  for layer, kind in enumerate(layers):
    prefix = f"model.layers.{layer}."
    own = lambda name, prefix=prefix: w(f"{prefix}self_attn.{name}")
    x_LD = decoder.rms_norm(x_LD, w(f"{prefix}input_layernorm.weight"), 1e-5)
    if kind == "linear_attention":
      y_LD = decoder.lightning(own, x_LD, heads, layer, len(layers))
    else:
      y_LD = decoder.attention(own, x_LD, heads, GQA["num_key_value_heads"], theta, rotary_dim)
    x_LD = decoder.rms_norm(1.5 * x_LD + 0.8 * y_LD, w(f"{prefix}post_attention_layernorm.weight"), 1e-5)

    def expert(e, x, prefix=prefix):
      matrices = (w(f"{prefix}block_sparse_moe.experts.{e}.{name}.weight") for name in ("w1", "w3", "w2"))
      return decoder.swiglu(x, *matrices)

    y_LD = decoder.moe(w(f"{prefix}block_sparse_moe.gate.weight"), expert, x_LD, 2, renormalize=True)
    x_LD = 1.5 * x_LD + 0.8 * y_LD
  return decoder.rms_norm(x_LD, w("model.norm.weight"), 1e-5) @ w("lm_head.weight").T


def test_the_prediction_module_of_deepseek_v3_is_named_and_skipped(tmp_path):
  """The published checkpoint has it as layer 61. The bias of the router becomes state of the balancer."""
  prefix, fields = CASES["deepseek_v3"]
  model = saved(tmp_path, prefix, fields)
  tensors = {name: np.array(x) for name, x in open_folder(tmp_path, {}).tensors.items()}
  extra = {f"model.layers.3.{name}": np.ones(3, np.float32) for name in ("eh_proj.weight", "enorm.weight")}
  pending = {name: Pending(x.shape, x.dtype, lambda x=x: x) for name, x in (tensors | extra).items()}
  write_file(tmp_path / "model.safetensors", pending)
  with pytest.raises(
    moe_jax.InputError, match=r"no use here for 2 tensors, such as model.layers.3.eh_proj.weight"
  ):
    moe_jax.load(tmp_path)
  change_config(tmp_path, num_nextn_predict_layers=1)
  loaded = moe_jax.load(tmp_path)
  assert loaded.skipped == tuple(sorted(extra))
  bias_E = model.model.layers[1].mlp.gate.e_score_correction_bias.numpy()
  state = loaded.model.segments[1].pattern.blocks[0].ffn.balancer_state.get_value()
  found = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (2, len(bias_E))]
  np.testing.assert_array_equal(found[0][0], bias_E)


def test_mxfp4_is_what_transformers_makes_of_it(tmp_path):
  """gpt-oss as it is published, and the same with what transformers makes of its blocks."""
  from transformers.integrations.mxfp4 import convert_moe_packed_tensors

  prefix, fields = CASES["gpt_oss"]
  saved(tmp_path, prefix, fields | {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2})
  tensors = {name: np.array(x) for name, x in open_folder(tmp_path, {}).tensors.items()}
  loaded = {}
  rng = np.random.default_rng(0)
  for packed in (True, False):
    own, rng = dict(tensors), np.random.default_rng(0)
    for name in [name for name in tensors if name.endswith("_proj") and "experts" in name]:
      experts, rows, columns = own.pop(name).shape
      blocks = rng.integers(0, 256, (experts, columns, rows // 32, 16)).astype(np.uint8)
      scales = rng.integers(120, 126, blocks.shape[:-1]).astype(np.uint8)
      if packed:
        own |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
      else:
        arrays = (oracles.torch.tensor(blocks), oracles.torch.tensor(scales))
        own[name] = convert_moe_packed_tensors(*arrays, dtype=oracles.torch.float32).numpy()
    pending = {name: Pending(x.shape, x.dtype, lambda x=x: x) for name, x in own.items()}
    write_file(tmp_path / "model.safetensors", pending)
    loaded[packed] = moe_jax.load(tmp_path).model
  assert_same_model(loaded[True], loaded[False])


@pytest.mark.parametrize("shape", [(128, 256), (256, 128)])
def test_fp8_is_what_transformers_makes_of_it(shape):
  """For whole blocks. With ragged ones, as in the released DeepSeek-V3, this function of transformers refuses."""
  from transformers.integrations.finegrained_fp8 import Fp8Dequantize

  values = oracles.normals(*shape).astype(ml_dtypes.float8_e4m3fn)
  scales = np.abs(oracles.normals(shape[0] // 128, shape[1] // 128, seed=1))
  torch_values = oracles.torch.tensor(values.view(np.uint8)).view(oracles.torch.float8_e4m3fn)
  expected = Fp8Dequantize(None)._dequantize_one(torch_values, oracles.torch.tensor(scales)).numpy()
  found = Blockwise(values, scales, (128, 128))[slice(0, shape[0]), slice(0, shape[1])]
  np.testing.assert_array_equal(found, expected)
