"""Every family without PyTorch: tensors by their published names, both ways, and one whole model as a loop."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import moe_jax
from moe_jax.errors import InputError
from moe_jax.interop.families import FAMILIES, Values
from moe_jax.interop.safetensors import Pending, open_file, write_file
from moe_jax.models import PRESETS
from moe_jax.nn.build import resolve
from tests.interop.helpers import assert_same_model, random_model
from tests.reference import decoder

V, D = 24, 16
SIZES = {
  "hidden_size": D,
  "intermediate_size": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 4,
  "vocab_size": V,
  "rope_theta": 1e4,
}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 6}
DEEPSEEK = {
  "n_routed_experts": 4,
  "num_experts_per_tok": 2,
  "moe_intermediate_size": 6,
  "n_shared_experts": 2,
}
DEEPSEEK |= {"first_k_dense_replace": 1, "num_key_value_heads": 4}
MLA = DEEPSEEK | {"kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
YARN = {
  "type": "yarn",
  "factor": 40,
  "original_max_position_embeddings": 8,
  "mscale": 1.0,
  "mscale_all_dim": 1.0,
}

# model_type -> (config.json, tensors of layer 1 besides its two norms)
ATTENTION = {f"self_attn.{x}_proj.weight": [16, 16] if x in "qo" else [8, 16] for x in "qkvo"}
QK_NORM = {"self_attn.q_norm.weight": [4], "self_attn.k_norm.weight": [4]}


def swiglu(prefix, width):
  up = {f"{prefix}.{name}_proj.weight": [width, D] for name in ("gate", "up")}
  return up | {f"{prefix}.down_proj.weight": [D, width]}


def experts(count, width=6):
  return {name: shape for e in range(count) for name, shape in swiglu(f"mlp.experts.{e}", width).items()}


def mixtral(count):
  names = {"block_sparse_moe.gate.weight": [count, D]}
  for e in range(count):
    shapes = {"w1": [24, D], "w3": [24, D], "w2": [D, 24]}
    names |= {f"block_sparse_moe.experts.{e}.{name}.weight": shape for name, shape in shapes.items()}
  return names


LATENT = {
  "self_attn.kv_a_proj_with_mqa.weight": [12, D],
  "self_attn.kv_a_layernorm.weight": [8],
  "self_attn.kv_b_proj.weight": [44, 8],
  "self_attn.o_proj.weight": [D, 20],
}
LOW_RANK = {
  "self_attn.q_a_proj.weight": [7, D],
  "self_attn.q_a_layernorm.weight": [7],
  "self_attn.q_b_proj.weight": [40, 7],
}
SHARED = {"mlp.gate.weight": [4, D], **experts(4), **swiglu("mlp.shared_experts", 12)}
BIAS = {"mlp.gate.e_score_correction_bias": [4]}
CASES = {
  "mixtral": (SIZES | {"num_local_experts": 3, "num_experts_per_tok": 2}, ATTENTION | mixtral(3)),
  "qwen3_moe": (SIZES | EXPERTS, ATTENTION | QK_NORM | {"mlp.gate.weight": [3, D]} | experts(3)),
  "qwen2_moe": (
    SIZES | EXPERTS | {"shared_expert_intermediate_size": 10},
    ATTENTION
    | {f"self_attn.{x}_proj.bias": [16 if x == "q" else 8] for x in "qkv"}
    | {"mlp.gate.weight": [3, D], "mlp.shared_expert_gate.weight": [1, D]}
    | experts(3)
    | swiglu("mlp.shared_expert", 10),
  ),
  "olmoe": (
    SIZES | {"num_experts": 3, "num_experts_per_tok": 2},
    ATTENTION
    | {"self_attn.q_norm.weight": [16], "self_attn.k_norm.weight": [8], "mlp.gate.weight": [3, D]}
    | experts(3, 24),
  ),
  "deepseek": (SIZES | DEEPSEEK, ATTENTION | {f"self_attn.{x}_proj.weight": [16, 16] for x in "kv"} | SHARED),
  "deepseek_v2": (
    SIZES | MLA | {"rope_scaling": YARN},
    LATENT | {"self_attn.q_proj.weight": [40, D]} | SHARED,
  ),
  "deepseek_v3": (
    SIZES | MLA | {"q_lora_rank": 7, "n_group": 2, "topk_group": 1, "rope_scaling": YARN},
    LATENT | LOW_RANK | SHARED | BIAS,
  ),
  "kimi_k2": (
    SIZES | MLA | {"q_lora_rank": 7, "n_group": 1, "topk_group": 1},
    LATENT | LOW_RANK | SHARED | BIAS,
  ),
  "gpt_oss": (
    SIZES
    | {"num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 4}
    | {
      "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32,
        "truncate": False,
        "original_max_position_embeddings": 8,
      }
    },
    ATTENTION
    | {f"self_attn.{x}_proj.bias": [8 if x in "kv" else 16] for x in "qkvo"}
    | {"self_attn.sinks": [4], "mlp.router.weight": [3, D], "mlp.router.bias": [3]}
    | {"mlp.experts.gate_up_proj": [3, D, 48], "mlp.experts.gate_up_proj_bias": [3, 48]}
    | {"mlp.experts.down_proj": [3, 24, D], "mlp.experts.down_proj_bias": [3, D]},
  ),
  "minimax": (
    SIZES
    | {
      "num_local_experts": 3,
      "num_experts_per_tok": 2,
      "layer_types": ["full_attention", "linear_attention"],
    }
    | {f"{part}_alpha_factor": 2.0 for part in ("full_attn", "linear_attn", "mlp")},
    {"self_attn.qkv_proj.weight": [48, D], "self_attn.output_gate.weight": [16, D]}
    | {"self_attn.norm.weight": [16], "self_attn.out_proj.weight": [D, 16]}
    | mixtral(3),
  ),
}


def test_every_family_has_a_case():
  assert CASES.keys() == FAMILIES.keys()


@pytest.mark.parametrize("name", CASES)
def test_tensors_have_their_published_names_and_come_back(name, tmp_path):
  values, layer = CASES[name]
  config = FAMILIES[name].read(Values("config.json", values))
  model = random_model(config, V)
  moe_jax.save(model, tmp_path)
  tensors = open_file(tmp_path / "model.safetensors")
  prefix = "model.layers.1."
  found = {key.removeprefix(prefix): list(x.shape) for key, x in tensors.items() if key.startswith(prefix)}
  assert found == layer | {"input_layernorm.weight": [D], "post_attention_layernorm.weight": [D]}
  outside = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
  assert {key: x.shape for key, x in tensors.items() if "layers" not in key} == outside
  loaded = moe_jax.load(tmp_path)
  assert_same_model(loaded.model, model)
  assert loaded.config.model == resolve(config)


def test_the_module_of_multi_token_prediction(tmp_path):
  """Layer 2 of a V3 with two layers. Its names, and which half of `eh_proj` multiplies what, are those of the release."""
  values, layer = CASES["deepseek_v3"]
  config = FAMILIES["deepseek_v3"].read(Values("config.json", values))
  model = random_model(dataclasses.replace(config, mtp_depth=1), V)
  moe_jax.save(model, tmp_path)
  tensors = open_file(tmp_path / "model.safetensors")
  prefix = "model.layers.2."
  found = {key.removeprefix(prefix): list(x.shape) for key, x in tensors.items() if key.startswith(prefix)}
  norms = ("input_layernorm", "post_attention_layernorm", "enorm", "hnorm", "shared_head.norm")
  own = {"embed_tokens.weight": [V, D], "shared_head.head.weight": [V, D], "eh_proj.weight": [D, 2 * D]}
  assert found == layer | own | {f"{norm}.weight": [D] for norm in norms}
  np.testing.assert_array_equal(tensors[f"{prefix}embed_tokens.weight"], tensors["model.embed_tokens.weight"])
  hidden_DX, embedded_DX = model.successors[0].w_join_2DX.get_value()
  np.testing.assert_array_equal(
    tensors[f"{prefix}eh_proj.weight"], np.concatenate([embedded_DX, hidden_DX]).T
  )
  loaded = moe_jax.load(tmp_path, mtp=True)
  assert_same_model(loaded.model, model)
  assert len(loaded.skipped) == 2 and str(loaded.config.train.objective) == "next_tokens"
  without = moe_jax.load(tmp_path)
  assert set(without.skipped) == {f"{prefix}{name}" for name in found}
  moe_jax.save(without, tmp_path / "without")
  assert not moe_jax.load(tmp_path / "without").skipped
  with pytest.raises(
    InputError, match=r"config.json: has no module of multi-token prediction; use mtp=False"
  ):
    moe_jax.load(tmp_path / "without", mtp=True)


def test_the_module_of_a_tied_model_copies_the_embedding(tmp_path):
  config = dataclasses.replace(PRESETS["deepseek_v3_tiny"].model, tie_embeddings=True)
  model = random_model(config, V)
  moe_jax.save(model, tmp_path)
  tensors = open_file(tmp_path / "model.safetensors")
  assert "lm_head.weight" not in tensors
  (head,) = (np.asarray(x) for name, x in tensors.items() if name.endswith("shared_head.head.weight"))
  np.testing.assert_array_equal(head, tensors["model.embed_tokens.weight"])
  assert_same_model(moe_jax.load(tmp_path, mtp=True).model, model)
  assert moe_jax.load(tmp_path).config.model.tie_embeddings


def deepseek_checkpoint(folder):
  """Writes random tensors by their published names and returns (tensors in float64, tokens_L)."""
  values, layer = CASES["deepseek"]
  rng = np.random.default_rng(0)
  shapes = {f"model.layers.1.{key}": shape for key, shape in layer.items()}
  shapes |= {f"model.layers.0.{key}": shape for key, shape in layer.items() if key.startswith("self_attn")}
  shapes |= {f"model.layers.0.{key}": shape for key, shape in swiglu("mlp", 24).items()}
  shapes |= {"model.embed_tokens.weight": [V, D], "model.norm.weight": [D], "lm_head.weight": [V, D]}
  norms = ("input_layernorm", "post_attention_layernorm")
  shapes |= {f"model.layers.{layer}.{norm}.weight": [D] for layer in range(2) for norm in norms}
  w = {key: rng.normal(scale=0.4, size=shape).astype(np.float32) for key, shape in shapes.items()}
  pending = {key: Pending(x.shape, x.dtype, lambda x=x: x) for key, x in w.items()}
  write_file(folder / "model.safetensors", pending)
  (folder / "config.json").write_text(json.dumps(values | {"model_type": "deepseek"}))
  return {key: x.astype(np.float64) for key, x in w.items()}, rng.integers(0, V, 7)


def test_deepseek_moe_16b_as_a_loop(tmp_path):
  """Softmax before the selection, weights not renormalised, two shared experts as one, and a dense first layer.

  transformers has no such model. tests/parity/test_checkpoints.py has the gradients.
  """
  w, tokens_L = deepseek_checkpoint(tmp_path)
  loaded = moe_jax.load(tmp_path)
  logits_BLV, _ = jax.jit(lambda tokens_BL: loaded.model(tokens_BL))(tokens_L[None])
  expected_LV = deepseek_moe(w, tokens_L)
  np.testing.assert_allclose(logits_BLV[0], expected_LV, rtol=0, atol=2e-5 * np.abs(expected_LV).max())


def deepseek_moe(w, tokens_L):
  x_LD = w["model.embed_tokens.weight"][tokens_L]
  for layer in range(2):
    own = lambda name, layer=layer: w[f"model.layers.{layer}.{name}"]
    ffn = lambda x, name, own=own: decoder.swiglu(
      x, *(own(f"{name}.{m}_proj.weight") for m in ("gate", "up", "down"))
    )
    h_LD = decoder.rms_norm(x_LD, own("input_layernorm.weight"), 1e-6)
    x_LD = x_LD + decoder.attention(lambda name, own=own: own(f"self_attn.{name}"), h_LD, 4, 4, 1e4, 4)
    h_LD = decoder.rms_norm(x_LD, own("post_attention_layernorm.weight"), 1e-6)
    if layer == 0:
      x_LD = x_LD + ffn(h_LD, "mlp")
    else:
      expert = lambda e, x, ffn=ffn: ffn(x, f"mlp.experts.{e}")
      routed_LD = decoder.moe(own("mlp.gate.weight"), expert, h_LD, 2, renormalize=False)
      x_LD = x_LD + routed_LD + ffn(h_LD, "mlp.shared_experts")
  return decoder.rms_norm(x_LD, w["model.norm.weight"], 1e-6) @ w["lm_head.weight"].T
