"""Checkpoints that transformers writes, loaded here; and those that we write, loaded there."""

import json
import pathlib

import numpy as np
import pytest

import moe_jax
from moe_jax.interop.folder import open_folder
from tests.interop.helpers import assert_same_model
from tests.parity import models, oracles
from tests.parity.models import GQA

CASES = {
  "mixtral": ("Mixtral", GQA | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}),
  "qwen3_moe": (
    "Qwen3Moe",
    GQA
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    | {"num_hidden_layers": 3, "mlp_only_layers": [0], "norm_topk_prob": True},
  ),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
  """The model there, its folder, what it makes of the tokens, and what ours does."""
  prefix, fields = CASES[request.param]
  model = models.build(prefix, **fields)
  folder = tmp_path_factory.mktemp(request.param)
  model.save_pretrained(folder)
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
  _, _, theirs, ours = case
  for name, expected in theirs.gradients.items():
    if name.endswith("e_score_correction_bias"):
      continue
    scale = np.abs(expected).max()
    assert scale > 1e-6 or ".experts." in name, name
    np.testing.assert_allclose(ours.gradients[name], expected, rtol=1e-4, atol=1e-4 * scale, err_msg=name)
  assert ours.gradients.keys() == theirs.gradients.keys()


def test_the_packed_layout_is_the_same_model(case, tmp_path):
  model, loaded, _, _ = case
  model.save_pretrained(tmp_path, save_original_format=False)
  assert_same_model(moe_jax.load(tmp_path).model, loaded.model)


def test_transformers_loads_what_we_save(case, tmp_path):
  """Every tensor has its bits, so loading again gives the same model, and transformers the same logits."""
  model, loaded, theirs, _ = case
  moe_jax.save(loaded, tmp_path)
  there, back = (dict(open_folder(pathlib.Path(f), {}).tensors) for f in (loaded.folder, tmp_path))
  assert back.keys() == there.keys()
  for name, values in there.items():
    np.testing.assert_array_equal(back[name], values, err_msg=name)
  again = type(model).from_pretrained(tmp_path).eval()
  with oracles.torch.no_grad():
    logits_BLV = again(oracles.torch.tensor(models.TOKENS_BL).long()).logits.numpy()
  np.testing.assert_allclose(logits_BLV, theirs.logits_BLV, rtol=0, atol=1e-6 * np.abs(logits_BLV).max())
  assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(model).__name__]
