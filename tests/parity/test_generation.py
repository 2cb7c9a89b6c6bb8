"""The most likely continuation of a checkpoint here and in transformers."""

import numpy as np
import pytest

import moe_jax
from moe_jax.inference.generate import generate_tokens
from tests.parity import models, oracles
from tests.parity.test_checkpoints import CASES

NEW = 9
PROMPTS = [[5, 9, 20, 31, 7, 3], [17]]


@pytest.mark.parametrize(
  "name", ["mixtral", "gpt_oss", "deepseek_v3"]
)  # a window, also with sinks; latent attention
def test_the_same_continuation(name, tmp_path):
  prefix, fields = CASES[name]
  theirs = models.build(prefix, **fields)
  theirs.save_pretrained(tmp_path)
  options = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0}
  run = lambda prompt: theirs.generate(oracles.torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
  loaded = moe_jax.load(tmp_path)
  assert loaded.max_positions == fields["max_position_embeddings"]
  pieces = list(generate_tokens(loaded.model, PROMPTS, NEW))
  found = [np.concatenate(of_prompt).astype(int).tolist() for of_prompt in zip(*pieces, strict=True)]
  assert found == [run(prompt) for prompt in PROMPTS]
  assert all(len(set(tokens)) > 2 for tokens in found)
