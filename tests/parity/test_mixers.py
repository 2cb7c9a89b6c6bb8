"""The token mixers against the attention of Hugging Face transformers, with the same weights, and YaRN's frequencies."""

from typing import NamedTuple

import jax
import numpy as np
import pytest
from flax import nnx

from moe_jax.nn import Context
from moe_jax.nn.mixers import MIXERS
from moe_jax.ops.rotary import Rotary, Yarn
from tests.nn.layer import randomized
from tests.parity import oracles

L, D, N, N_KV, H = 14, 32, 4, 2, 8
X_BLD = oracles.normals(2, L, D, seed=1)
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 8.0, "original_max_position_embeddings": 16,
        "beta_fast": 2.0, "beta_slow": 0.5}  # fmt: skip
OUR_YARN = "yarn_factor=8:yarn_length=16:yarn_beta_fast=2:yarn_beta_slow=0.5"
PLAIN = {"rope_type": "default", "rope_theta": 100.0}
MLA = {"kv_lora_rank": 6, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 3}
OUR_MLA = "mla:kv_rank=6:nope_dim=6:rope_dim=4:value_dim=3"


class Case(NamedTuple):
  """One mixer here and there."""

  model: str
  fields: dict  # of the configuration there
  spec: str  # of the mixer here
  qk_norm: bool = False
  layer: int = 0
  part: str = "Attention"
  window: int = L


CASES = {
  "qwen2_moe": Case("qwen2_moe", {"rope_parameters": PLAIN}, "attention:qkv_bias=true"),
  "qwen3_moe": Case("qwen3_moe", {"rope_parameters": PLAIN, "head_dim": H}, "attention", True),
  "olmoe": Case(
    "olmoe",
    {"rope_parameters": PLAIN, "clip_qkv": 0.5},
    "attention:qk_norm_over=projection:clip_qkv=0.5",
    True,
  ),
  "gpt_oss": Case(
    "gpt_oss",
    {
      "rope_parameters": YARN | {"truncate": False},
      "head_dim": H,
      "sliding_window": 4,
      "num_hidden_layers": 2,
    },
    f"attention:qkv_bias=true:out_bias=true:sinks=true:window=4:yarn_truncate=false:{OUR_YARN}",
    window=4,
  ),
  "deepseek_v3": Case(
    "deepseek_v3",
    MLA | {"q_lora_rank": 7, "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    f"{OUR_MLA}:query_rank=7:yarn_mscale_all_dim=1:{OUR_YARN}",
  ),
  "deepseek_v2": Case(  # Lite
    "deepseek_v2",
    MLA | {"q_lora_rank": None, "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    f"{OUR_MLA}:yarn_mscale=0.707:yarn_mscale_all_dim=0.707:{OUR_YARN}",
  ),
  "minimax": Case(
    "minimax",
    {"head_dim": H, "block_size": 4, "num_hidden_layers": 4, "layer_types": ["linear_attention"] * 4},
    "lightning:chunk=5",
    layer=2,
    part="LightningAttention",
  ),
}


def ours(case):
  method = MIXERS.resolve(case.spec)
  sizes = {
    "dim": D,
    "num_heads": N,
    "num_kv_heads": N_KV,
    "head_dim": H,
    "rope_theta": 100.0,
    "num_layers": 4,
  }
  make = lambda: method(**sizes, qk_norm=case.qk_norm, norm_eps=1e-5, rngs=nnx.Rngs(0))
  return randomized(make, seed=2)


def their_arrays(case, mixer):
  """Our parameters by the names that they have there. Matrices there are [out, in]."""
  w = {path[-1]: np.asarray(leaf) for path, leaf in nnx.to_flat_state(nnx.state(mixer, nnx.Param))}
  norms = {
    path[0]: np.asarray(leaf)
    for path, leaf in nnx.to_flat_state(nnx.state(mixer, nnx.Param))
    if len(path) > 1
  }
  into = lambda w_DNH: w_DNH.reshape(w_DNH.shape[0], -1).T
  out = w["w_out_NHD"].reshape(-1, D).T
  if "lightning" in case.spec:
    qkv = np.stack([w[f"w_{x}_DNH"] for x in ("query", "key", "value")], axis=2)
    gate = into(w["w_out_gate_DNH"])
    return {
      "qkv_proj.weight": into(qkv),
      "output_gate.weight": gate,
      "out_proj.weight": out,
      "norm.weight": norms["norm"],
    }
  arrays = {"o_proj.weight": out}
  if "mla" in case.spec:
    up = np.concatenate([w["w_key_up_XNH"], w["w_value_up_XNH"]], axis=-1)
    down = np.concatenate([w["w_kv_down_DX"], w["w_key_rope_DH"]], axis=-1)
    arrays |= {
      "kv_a_proj_with_mqa.weight": down.T,
      "kv_a_layernorm.weight": norms["kv_norm"],
      "kv_b_proj.weight": into(up),
    }
    if "query_norm" not in norms:
      return arrays | {"q_proj.weight": into(w["w_query_DNH"])}
    query = {"q_a_proj.weight": w["w_query_down_DX"].T, "q_b_proj.weight": into(w["w_query_up_XNH"])}
    return arrays | query | {"q_a_layernorm.weight": norms["query_norm"]}
  for name, short in (("query", "q"), ("key", "k"), ("value", "v")):
    arrays[f"{short}_proj.weight"] = into(w[f"w_{name}_DNH"])
    if f"b_{name}_NH" in w:
      arrays[f"{short}_proj.bias"] = w[f"b_{name}_NH"].ravel()
    if f"{name}_norm" in norms:
      arrays[f"{short}_norm.weight"] = norms[f"{name}_norm"]
  arrays |= {"o_proj.bias": w["b_out_D"]} if "b_out_D" in w else {}
  return arrays | ({"sinks": w["sink_N"]} if "sink_N" in w else {})


def theirs(case, mixer):
  heads = N if "mla" in case.spec else N_KV
  fields = {"hidden_size": D, "num_attention_heads": N, "num_key_value_heads": heads, "rms_norm_eps": 1e-5}
  fields |= {"max_position_embeddings": 128} | case.fields
  block = oracles.build(case.model, case.part, case.layer, **fields)
  buffers = {name: value.numpy() for name, value in block.named_buffers()}
  oracles.load(block, **their_arrays(case, mixer), **buffers)
  x = oracles.torch.tensor(X_BLD)
  given = {"position_embeddings": None, "attention_mask": None}
  if "lightning" not in case.spec:
    block.config._attn_implementation = "eager"
    rotary = getattr(oracles.modeling(case.model), oracles.PREFIX[case.model] + "RotaryEmbedding")(
      block.config
    )
    behind_LL = np.arange(L)[:, None] - np.arange(L)[None]
    mask = np.where((behind_LL >= 0) & (behind_LL < case.window), 0, -1e30).astype(np.float32)[None, None]
    given = {
      "position_embeddings": rotary(x, oracles.torch.arange(L)[None]), "attention_mask": oracles.torch.tensor(mask)
    }  # fmt: skip
  with oracles.torch.no_grad():
    return block(x, **given)[0].numpy()


@pytest.mark.parametrize("name", CASES)
def test_the_same_output(name):
  case = CASES[name]
  mixer = ours(case)
  y_BLD, _ = jax.jit(lambda mixer, x: mixer(x, Context(layer=case.layer)))(mixer, X_BLD)
  np.testing.assert_allclose(y_BLD, theirs(case, mixer), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  "fields",
  [
    {"factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0},  # V3
    {"factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 0.707, "mscale_all_dim": 0.707},
    {"factor": 32.0, "original_max_position_embeddings": 4096, "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0,
     "mscale_all_dim": 1.0},  # K2
    {"factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False, "rope_theta": 150_000.0},  # gpt-oss
    {"factor": 8.0, "original_max_position_embeddings": 16, "rope_theta": 100.0},  # both ends of the ramp are cut off
  ],
)  # fmt: skip
def test_yarn_has_the_same_frequencies(fields):
  from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

  fields = {"rope_theta": 10_000.0} | fields
  config = oracles.transformers.Qwen3MoeConfig(head_dim=64, rope_parameters={"rope_type": "yarn"} | fields)
  expected, magnitude = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
  theta = fields.pop("rope_theta")
  yarn = Yarn(fields.pop("factor"), fields.pop("original_max_position_embeddings"), **fields)
  np.testing.assert_allclose(Rotary(64, theta, yarn=yarn).frequencies(), expected.numpy(), rtol=1e-5)
  np.testing.assert_allclose(
    yarn.magnitude(yarn.mscale) / yarn.magnitude(yarn.mscale_all_dim), magnitude, rtol=1e-6
  )
