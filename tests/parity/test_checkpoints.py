"""Checkpoints that transformers writes, loaded here; and those that we write, loaded there."""

import json
import pathlib

import numpy as np
import pytest

import moe_jax
from moe_jax.interop.folder import open_folder
from moe_jax.models import PRESETS
from tests.interop.helpers import assert_same_model, random_model
from tests.parity import loop, models, oracles
from tests.parity.models import GQA, SIZES

STORED = json.loads((pathlib.Path(__file__).parents[2] / "docs/results/parity.json").read_text())
MLA = SIZES | {"kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
MLA |= {
  "num_hidden_layers": 3,
  "first_k_dense_replace": 1,
  "moe_intermediate_size": 12,
  "num_experts_per_tok": 3,
}
MLA |= {"n_routed_experts": 8, "n_group": 4, "topk_group": 2}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 8}
V3 = MLA | {"q_lora_rank": 7, "num_mtp_layers": 0, "num_key_value_heads": 4}
CASES = {
  "mixtral": ("Mixtral", GQA | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}),
  "qwen3_moe": (
    "Qwen3Moe",
    GQA
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    | {"num_hidden_layers": 3, "mlp_only_layers": [0], "norm_topk_prob": True},
  ),
  "olmoe": (
    "Olmoe",
    SIZES | {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 0.5},
  ),
  "qwen2_moe": (
    "Qwen2Moe",
    SIZES
    | {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    | {"num_hidden_layers": 4, "decoder_sparse_step": 2, "shared_expert_intermediate_size": 20},
  ),
  "deepseek_v2": (
    "DeepseekV2",
    MLA
    | {"q_lora_rank": 7, "topk_method": "group_limited_greedy", "routed_scaling_factor": 4.0}
    | {"rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
  ),
  "deepseek_v2_lite": ("DeepseekV2", MLA | {"q_lora_rank": None, "n_group": None, "topk_group": None}),
  "deepseek_v3": ("DeepseekV3", V3 | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}),
  "kimi_k2": ("DeepseekV3", V3 | {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827}),
  "gpt_oss": (
    "GptOss",
    GQA
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4, "num_hidden_layers": 4}
    | {"rope_parameters": YARN | {"truncate": False}},
  ),
  "minimax": (
    "MiniMax",
    GQA
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 4}
    | {f"{part}_alpha_factor": 1.5 for part in ("full_attn", "linear_attn", "mlp")}
    | {f"{part}_beta_factor": 0.8 for part in ("full_attn", "linear_attn", "mlp")}
    | {"num_hidden_layers": 3, "layer_types": ["linear_attention"] * 2 + ["full_attention"]}
    | {"rotary_dim": 8},  # see test_minimax_rotates_half_of_a_head
  ),
}


def saved(name, folder):
  """A tiny model of transformers, written to `folder`."""
  prefix, fields = CASES[name]
  model = models.build(prefix, **fields)
  model.save_pretrained(folder)
  if name == "kimi_k2":  # whose code is DeepSeek-V3's
    change_config(folder, model_type="kimi_k2")
  return model


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
  """The model there, its folder, what it makes of the tokens, and what ours does."""
  folder = tmp_path_factory.mktemp(request.param)
  model = saved(request.param, folder)
  loaded = moe_jax.load(folder)
  return model, loaded, models.theirs(model), models.ours(loaded)


def test_the_same_logits_and_loss(case):
  _, _, theirs, ours = case
  scale = np.abs(theirs.logits_BLV).max()
  assert scale > 1
  np.testing.assert_allclose(ours.logits_BLV, theirs.logits_BLV, rtol=0, atol=2e-5 * scale)
  np.testing.assert_allclose(ours.loss, theirs.loss, rtol=2e-5)


def test_the_same_experts(case):
  _, _, theirs, ours = case
  assert len(ours.selected) == len(theirs.selected) > 0
  for layer, (chosen, expected) in enumerate(zip(ours.selected, theirs.selected, strict=True)):
    np.testing.assert_array_equal(chosen, expected, err_msg=f"layer {layer}")


def test_the_same_gradients(case):
  """Of every tensor of the checkpoint, relative to the largest gradient in it."""
  model, _, theirs, ours = case
  buffers = {name for name, _ in model.named_buffers()}  # which have no gradient
  for name, expected in theirs.gradients.items():
    if name in buffers:
      continue
    scale = np.abs(expected).max()
    assert scale > 1e-6 or ".experts." in name, name
    np.testing.assert_allclose(ours.gradients[name], expected, rtol=1e-4, atol=1e-4 * scale, err_msg=name)
  assert ours.gradients.keys() - buffers == theirs.gradients.keys() - buffers


def assert_alike(found, row):
  """Within a factor of four: the last bits of a sum depend on the machine."""
  ratios = [found.logits / row["logits"], found.gradients / row["gradients"]]
  np.testing.assert_allclose(np.log(ratios), 0, atol=np.log(4))


def test_the_stored_figures_are_those_of_today(case):
  """docs/models.md shows them."""
  model, loaded, theirs, ours = case
  found, row = models.figures(model, ours, theirs), STORED[pathlib.Path(loaded.folder).name[:-1]]
  assert_alike(found, row)
  assert (found.differ, found.choices) == (row["differ"], row["choices"])


def test_deepseek_moe_16b_is_a_loop(tmp_path):
  """Logits and gradients, with the bounds of the others."""
  found, row = loop.figures(tmp_path), STORED["deepseek"]
  assert found.logits <= 2e-5 and found.gradients <= 1e-4
  assert_alike(found, row)


def change_config(folder, **fields):
  values = json.loads((folder / "config.json").read_text()) | fields
  (folder / "config.json").write_text(json.dumps(values))


def test_the_packed_layout_is_the_same_model(case, tmp_path):
  model, loaded, _, _ = case
  model.save_pretrained(tmp_path, save_original_format=False)
  assert_same_model(moe_jax.load(tmp_path).model, loaded.model)


def test_transformers_loads_what_we_save(case, tmp_path):
  """Every tensor has its bits, so loading again gives the same model, and transformers the same logits."""
  model, loaded, theirs, _ = case
  moe_jax.save(loaded, tmp_path)
  there, back = (dict(open_folder(pathlib.Path(f), {}).tensors) for f in (loaded.folder, tmp_path))
  assert back.keys() == there.keys() - set(loaded.skipped)
  for name, values in back.items():
    np.testing.assert_array_equal(values, there[name], err_msg=name)
  if (
    "kimi_k2" in (tmp_path / "config.json").read_text()
  ):  # needs code of its own there, or the name of this code
    with pytest.raises(ValueError, match="model type `kimi_k2`"):
      oracles.transformers.AutoConfig.from_pretrained(tmp_path)
    change_config(tmp_path, model_type="deepseek_v3")
  eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
  again = type(model).from_pretrained(tmp_path, **eager).eval()
  with oracles.torch.no_grad():
    logits_BLV = again(oracles.torch.tensor(models.TOKENS_BL).long()).logits.numpy()
  np.testing.assert_allclose(logits_BLV, theirs.logits_BLV, rtol=0, atol=1e-6 * np.abs(logits_BLV).max())
  assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(model).__name__]


@pytest.mark.parametrize(("name", "factor"), [("kimi_k2_tiny", 32), ("deepseek_v3_tiny", 40)])
def test_transformers_has_no_doubt_about_positions(name, factor, tmp_path, caplog):
  """It compares the factor of YaRN with the positions before and after."""
  config = PRESETS[name].model
  moe_jax.save(random_model(config, models.V), tmp_path)
  caplog.clear()
  oracles.transformers.logging.get_logger("transformers").warning_once.__func__.cache_clear()
  read = oracles.transformers.AutoConfig.from_pretrained(tmp_path)
  assert not caplog.records
  assert (read.max_position_embeddings, read.rope_parameters["factor"]) == (16 * factor, factor)
