"""Modules of multi-token prediction against those of transformers, which drafts with them, from a folder that we wrote."""

import dataclasses

import jax
import numpy as np

import moe_jax
from moe_jax.models import preset
from tests.interop.helpers import random_model
from tests.parity import oracles

B, L, V, DEPTH = 2, 12, 48, 2


def test_modules_have_the_logits_of_transformers(tmp_path, monkeypatch):
  """Every module at every position that has a target; the second module reads what the first gives."""
  from transformers.modeling_layers import MtpModel

  torch = oracles.torch
  config = dataclasses.replace(preset("deepseek_v3_tiny").model, mtp_depth=DEPTH)
  model = random_model(config, V)
  moe_jax.save(model, tmp_path)
  window = np.random.default_rng(0).integers(0, V, (B, L + 1)).astype(np.int32)
  tokens_BL, next_BL = window[:, :-1], window[:, 1:]
  ours, _ = jax.jit(lambda tokens, after: model.predict_ahead(tokens, after))(tokens_BL, next_BL)

  kind, layers = oracles.transformers.DeepseekV3ForCausalLM, config.num_layers
  # It knows by number which layers are modules: those behind the 61 of the real model.
  names = rf"model\.layers\.({layers}|{layers + 1})\."
  monkeypatch.setattr(kind, "_keys_to_ignore_on_load_unexpected", [names])
  theirs = kind.from_pretrained(tmp_path, attn_implementation="eager", experts_implementation="eager").eval()
  modules = MtpModel.from_pretrained(theirs).eval()
  assert len(modules.layers) == DEPTH
  with torch.no_grad():
    hidden = theirs.model(torch.tensor(tokens_BL).long()).last_hidden_state
    expected = [theirs.lm_head(hidden)]
    for k in range(DEPTH):
      ids = torch.tensor(
        np.roll(next_BL, -k, axis=1)
      ).long()  # what comes round is behind all positions that count
      position = torch.arange(L)[None]
      hidden = modules.forward_layer(k, hidden, position, None, input_ids=ids)
      expected.append(modules.shared_head(hidden))
  for k, (found, logits) in enumerate(zip(ours, expected, strict=True)):
    exists = L - k  # of the others the target is not known, and their tokens are not routed
    logits = logits.numpy()[:, :exists]
    difference = np.abs(np.asarray(found)[:, :exists] - logits).max()
    assert difference <= 2e-5 * np.abs(logits).max(), k
