"""The presets of published models have the config.json of the release, as far as it says what is computed."""

import pytest

from moe_jax.errors import InputError
from moe_jax.interop.describe import describe
from moe_jax.interop.families import FAMILIES, Values
from moe_jax.interop.families.fields import layers_of
from moe_jax.models import PRESETS, VOCAB_SIZES
from moe_jax.nn.build import resolve
from tests.interop.test_families import CASES

QWEN2 = {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "qkv_bias": True, "norm_topk_prob": False}
QWEN2 |= {"vocab_size": 151_936, "router_aux_loss_coef": 0.001}
QWEN3 = {
  "vocab_size": 151_936,
  "norm_topk_prob": True,
  "num_experts": 128,
  "num_experts_per_tok": 8,
  "head_dim": 128,
}
MLA = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
YARN = {
  "factor": 40.0,
  "original_max_position_embeddings": 4096,
  "beta_fast": 32.0,
  "beta_slow": 1.0,
  "type": "yarn",
}
GPT_OSS_YARN = YARN | {"factor": 32.0, "truncate": False}
V3 = MLA | {"q_lora_rank": 1536, "hidden_size": 7168, "num_hidden_layers": 61, "intermediate_size": 18432}
V3 |= {"moe_intermediate_size": 2048, "n_shared_experts": 1, "num_experts_per_tok": 8, "norm_topk_prob": True}
V3 |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "rms_norm_eps": 1e-6}

# preset -> (model_type, values of the released config.json)
PUBLISHED = {
  "mixtral_8x7b": (
    "mixtral",
    {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5}
    | {"rope_theta": 1e6, "router_aux_loss_coef": 0.02, "vocab_size": 32_000, "sliding_window": None},
  ),
  "mixtral_8x22b": (
    "mixtral",
    {"hidden_size": 6144, "intermediate_size": 16384, "num_hidden_layers": 56, "num_attention_heads": 48}
    | {"num_key_value_heads": 8, "router_aux_loss_coef": 0.001},
  ),
  "qwen3_30b_a3b": (
    "qwen3_moe",
    QWEN3
    | {"hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32},
  ),
  "qwen3_235b_a22b": (
    "qwen3_moe",
    QWEN3
    | {
      "hidden_size": 4096,
      "moe_intermediate_size": 1536,
      "num_hidden_layers": 94,
      "num_attention_heads": 64,
    },
  ),
  "qwen15_moe_a27b": (
    "qwen2_moe",
    QWEN2
    | {"hidden_size": 2048, "num_hidden_layers": 24, "num_experts": 60, "num_experts_per_tok": 4}
    | {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
  ),
  "qwen2_57b_a14b": (
    "qwen2_moe",
    QWEN2
    | {"hidden_size": 3584, "num_hidden_layers": 28, "num_experts": 64, "num_experts_per_tok": 8}
    | {"moe_intermediate_size": 2560, "shared_expert_intermediate_size": 20480, "num_key_value_heads": 4},
  ),
  "olmoe_1b_7b": (
    "olmoe",
    {"hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16, "num_experts": 64}
    | {"num_experts_per_tok": 8, "norm_topk_prob": False, "vocab_size": 50_304, "rms_norm_eps": 1e-5},
  ),
  "deepseek_moe_16b": (
    "deepseek",
    {"hidden_size": 2048, "num_hidden_layers": 28, "n_routed_experts": 64, "num_experts_per_tok": 6}
    | {
      "n_shared_experts": 2,
      "moe_intermediate_size": 1408,
      "intermediate_size": 10944,
      "norm_topk_prob": False,
    }
    | {"first_k_dense_replace": 1, "vocab_size": 102_400},
  ),
  "deepseek_v2_lite": (
    "deepseek_v2",
    MLA
    | {"q_lora_rank": None, "num_hidden_layers": 27, "topk_method": "greedy", "routed_scaling_factor": 1.0}
    | {"rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707, "rope_type": "yarn"}},
  ),
  "deepseek_v2": (
    "deepseek_v2",
    MLA
    | {"q_lora_rank": 1536, "num_hidden_layers": 60, "topk_method": "group_limited_greedy", "n_group": 8}
    | {
      "topk_group": 3,
      "routed_scaling_factor": 16.0,
      "n_routed_experts": 160,
      "moe_intermediate_size": 1536,
    },
  ),
  "deepseek_v3": (
    "deepseek_v3",
    V3
    | {"n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "n_routed_experts": 256}
    | {"first_k_dense_replace": 3, "num_attention_heads": 128, "vocab_size": 129_280, "rope_theta": 1e4}
    | {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "rope_type": "yarn"}},
  ),
  "kimi_k2": (
    "kimi_k2",
    V3
    | {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827, "n_routed_experts": 384}
    | {"first_k_dense_replace": 1, "num_attention_heads": 64, "vocab_size": 163_840, "rope_theta": 5e4},
  ),
  "gpt_oss_20b": (
    "gpt_oss",
    {"num_hidden_layers": 24, "num_local_experts": 32, "hidden_size": 2880, "intermediate_size": 2880}
    | {"num_experts_per_tok": 4, "sliding_window": 128, "rope_theta": 150_000, "swiglu_limit": 7.0}
    | {
      "rope_scaling": GPT_OSS_YARN | {"rope_type": "yarn"},
      "attention_bias": True,
      "router_aux_loss_coef": 0.9,
    }
    | {"layer_types": ["sliding_attention", "full_attention"] * 12, "head_dim": 64},
  ),
  "gpt_oss_120b": ("gpt_oss", {"num_hidden_layers": 36, "num_local_experts": 128}),
  "minimax_text_01": (
    "minimax",
    {"num_hidden_layers": 80, "hidden_size": 6144, "intermediate_size": 9216, "num_local_experts": 32}
    | {"rope_theta": 1e7, "rotary_dim": 64, "block_size": 256, "vocab_size": 200_064, "head_dim": 128}
    | {"full_attn_alpha_factor": 3.5565588200778455, "mlp_beta_factor": 1.0}
    | {"layer_types": (["linear_attention"] * 7 + ["full_attention"]) * 10},
  ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_the_released_configurations(name):
  """`describe` reads its config.json back, and finds the same computation."""
  model_type, values = PUBLISHED[name]
  config = resolve(PRESETS[name].model)
  family, written = describe(config, VOCAB_SIZES[name], model_type)
  assert family is FAMILIES[model_type]
  assert {key: written.get(key) for key in values} == values
  if "router_aux_loss_coef" in values:
    read = family.read(Values("config.json", written | values))
    assert read.moe.balancers == PRESETS[name].model.moe.balancers


def test_every_published_preset_is_of_a_family():
  """The tiny ones are found without saying which family it is."""
  ours = ("quick", "default", "long", "tiny", "gshard", "switch")
  names = [name for name in PRESETS if not name.startswith(ours)]
  assert len(names) == 2 * len(PUBLISHED) == len(PUBLISHED.keys() & set(names)) * 2
  for name in (name for name in names if name.endswith("_tiny")):
    describe(resolve(PRESETS[name].model), VOCAB_SIZES[name])


def test_the_first_release_of_minimax_names_its_fields_differently():
  values = {
    "hidden_size": 16,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "head_dim": 8,
    "rotary_dim": 4,
  }
  values |= {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16, "rope_theta": 1e7}
  new = {f"{part}_attn_alpha_factor": 2.0 for part in ("full", "linear")} | {"mlp_alpha_factor": 2.0}
  new["layer_types"] = ["linear_attention"] * 7 + ["full_attention"]
  old = {f"layernorm_{part}_alpha": 2.0 for part in ("full_attention", "linear_attention", "mlp")}
  old["attn_type_list"] = [0] * 7 + [1]
  read = FAMILIES["minimax"].read
  assert read(Values("config.json", values | old)) == read(Values("config.json", values | new))


# of a config class of transformers, see tests/parity/test_config_defaults.py
THETAS = {"mixtral": 1e6, "gpt_oss": 150_000.0, "minimax": 1e6}
LARGER_EPS = ("mixtral", "olmoe", "gpt_oss", "minimax")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_its_own_theta_and_epsilon(name):
  values = {key: value for key, value in CASES[name][0].items() if key != "rope_theta"}
  config = FAMILIES[name].read(Values("config.json", values))
  assert config.rope_theta == THETAS.get(name, 10_000.0)
  assert config.norm_eps == (1e-5 if name in LARGER_EPS else 1e-6)
  with pytest.raises(InputError, match=r"^config\.json: rms_norm_eps is missing$"):
    FAMILIES[name].read(Values("config.json", values | {"rms_norm_eps": None}))


def test_gpt_oss_has_yarn_and_a_window_unless_told():
  """Files of `moe_jax.save` before this was so said nothing of positions that are not scaled."""
  values = {key: x for key, x in CASES["gpt_oss"][0].items() if key not in ("rope_scaling", "sliding_window")}
  mixers = lambda **more: [
    str(block.mixer) for block in layers_of(FAMILIES["gpt_oss"].read(Values("config.json", values | more)))
  ]
  window, full = mixers()
  assert "window=128" in window and "window" not in full
  assert all("yarn_factor=32.0:yarn_length=4096" in mixer for mixer in (window, full))
  assert mixers(rope_scaling=None) == [window, full]
  plain = mixers(rope_scaling={"rope_type": "default"})
  assert not any("yarn" in mixer for mixer in plain)
  assert mixers(swiglu_alpha=1.702) == plain
  # Its attention does not multiply scores by m(mscale_all_dim)^2, only cosines and sines by a quotient.
  both = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 8} | dict.fromkeys(
    ("mscale", "mscale_all_dim"), 0.7
  )
  assert mixers(rope_scaling=both)[0].endswith(":yarn_mscale=0.0:yarn_mscale_all_dim=0.0")
  assert not any("window=128" in mixer for mixer in mixers(sliding_window=None))
