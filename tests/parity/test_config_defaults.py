"""What a config.json leaves out, and YaRN's magnitudes, are read as transformers reads them."""

import jax
import numpy as np
import pytest

import moe_jax
from moe_jax.interop.families import FAMILIES, Values
from tests.interop.helpers import random_model
from tests.interop.test_families import CASES as OURS
from tests.parity import models, oracles
from tests.parity.test_checkpoints import CASES, YARN

GPT_OSS = OURS["gpt_oss"][0]
CLASSES = ("Mixtral", "Olmoe", "Qwen2Moe", "Qwen3Moe", "GptOss", "MiniMax", "DeepseekV2", "DeepseekV3")
# Without these other tensors are expected, so that a checkpoint is refused; or training has no loss of its own.
SEEN = {"num_key_value_heads", "head_dim", "n_shared_experts", "q_lora_rank", "first_k_dense_replace"}
SEEN |= {"router_aux_loss_coef", "max_position_embeddings"}


@pytest.mark.parametrize("prefix", CLASSES)
def test_a_value_that_is_left_out_is_that_of_the_class(prefix):
  values = getattr(oracles.transformers, f"{prefix}Config")().to_dict()
  family = FAMILIES[values["model_type"]]
  values = {name: value for name, value in values.items() if value is not None}
  values.pop("swiglu_alpha", None)  # no published config.json has it
  values.setdefault("num_experts_per_tok", 2)  # None in the class of V2, and always published
  read = lambda values: family.read(Values("config.json", values))
  expected, left_out = read(values), []
  for name in values.keys() - SEEN:
    less = {key: value for key, value in values.items() if key != name}
    try:
      found = read(less)
    except moe_jax.InputError as error:
      assert str(error).endswith(" is missing"), name
      continue
    left_out.append(name)
    assert found == expected, name
  assert {"rope_parameters", "rms_norm_eps"} <= set(left_out)


@pytest.mark.parametrize(
  ("name", "rope"),
  [
    ("gpt_oss", {"mscale": 1.2, "mscale_all_dim": 0.7}),
    ("gpt_oss", {"mscale_all_dim": 0.7}),
    ("deepseek_v3", {"mscale_all_dim": 0.7}),
    ("deepseek_v3", {"mscale": 1.2}),
    ("deepseek_v3", {"attention_factor": 1.3, "mscale_all_dim": 0.7}),
  ],
)
def test_magnitudes_of_yarn(name, rope, tmp_path):
  """Only DeepSeek's attention multiplies scores by m(mscale_all_dim)^2, and it does so also without mscale."""
  prefix, fields = CASES[name]
  fields = fields | {"num_hidden_layers": 2, "rope_parameters": YARN | rope}
  model = models.build(prefix, **fields)
  model.save_pretrained(tmp_path / "there")
  with oracles.torch.no_grad():
    expected_BLV = model(oracles.torch.tensor(models.TOKENS_BL).long()).logits.numpy()
  loaded = moe_jax.load(tmp_path / "there")
  found_BLV, _ = jax.jit(lambda model, tokens: model(tokens))(loaded.model, models.TOKENS_BL)
  np.testing.assert_allclose(found_BLV, expected_BLV, rtol=0, atol=2e-5 * np.abs(expected_BLV).max())
  moe_jax.save(loaded, tmp_path / "again")
  assert moe_jax.load(tmp_path / "again").config.model == loaded.config.model


def test_gpt_oss_without_yarn_stays_so(tmp_path):
  """Its class has YaRN where a config.json says nothing."""
  values = GPT_OSS | {"rope_scaling": {"rope_type": "default"}}
  moe_jax.save(random_model(FAMILIES["gpt_oss"].read(Values("config.json", values)), 24), tmp_path)
  read = oracles.transformers.AutoConfig.from_pretrained(tmp_path)
  assert read.rope_parameters == {"rope_type": "default", "rope_theta": values["rope_theta"]}


def test_gpt_oss_without_windows_is_read_there(tmp_path):
  """Its code makes the mask of the window also where no layer uses it, so that there must be one."""
  prefix, fields = CASES["gpt_oss"]
  model = models.build(prefix, **fields | {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2})
  model.save_pretrained(tmp_path / "there")
  moe_jax.save(moe_jax.load(tmp_path / "there"), tmp_path / "again")
  again = type(model).from_pretrained(tmp_path / "again", attn_implementation="eager").eval()
  tokens_BL = oracles.torch.tensor(models.TOKENS_BL).long()
  with oracles.torch.no_grad():
    found_BLV, expected_BLV = (m(tokens_BL).logits.numpy() for m in (again, model))
  np.testing.assert_allclose(found_BLV, expected_BLV, rtol=0, atol=1e-5 * np.abs(expected_BLV).max())
