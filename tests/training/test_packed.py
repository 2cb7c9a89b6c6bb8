"""Packed rows: examples behind each other compute what they compute alone, and none is cut, mixed or lost."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from moe_jax.config import DataConfig
from moe_jax.data.prompts import Example, place, prompt_dataset
from moe_jax.data.tokenizers import load_tokenizer
from moe_jax.errors import InputError
from moe_jax.nn.context import Context
from moe_jax.nn.transformer import Transformer
from moe_jax.training.objectives import NextTokens, Response
from tests.adapt import models

TOKENIZER = load_tokenizer("bytes")
CONFIG = DataConfig(sequence_length=24, batch_size=4)
RNG = np.random.default_rng(0)
WORDS = ["".join(map(chr, RNG.integers(97, 123, n))) for n in RNG.integers(1, 9, 40)]
EXAMPLES = [
  Example(f"{i} {p}:", r, "ab"[i % 2]) for i, (p, r) in enumerate(zip(WORDS[:20], WORDS[20:], strict=True))
]


def rows(pack: bool, length: int = 24):
  config = dataclasses.replace(CONFIG, pack_examples=pack, sequence_length=length)
  windows = prompt_dataset(config, EXAMPLES[:1], EXAMPLES[1:], TOKENIZER)._validation
  return windows.rows(range(len(windows)))


@jax.jit
def loss_and_gradient(model, batch):
  def loss(model):
    context = Context.of_batch(batch, record_scores=True)
    terms = Response()(model, batch, context)
    return terms.loss, [block.mixer for segment in terms.aux for block in segment]

  return nnx.value_and_grad(loss, has_aux=True)(model)


@pytest.mark.parametrize(
  "mixer",
  [
    "attention",
    "attention:window=9:sinks=true",
    "mla:kv_rank=8:nope_dim=4:rope_dim=4:value_dim=8",
  ],
)
def test_packed_examples_have_the_loss_and_the_gradient_of_separate_ones(mixer):
  model = Transformer(dataclasses.replace(models.CONFIG, mixer=mixer), TOKENIZER.vocab_size, rngs=nnx.Rngs(0))
  packed, alone = rows(True, 60), rows(False)
  assert len(packed["tokens_BL"]) < len(alone["tokens_BL"]) / 2
  ((loss, scores), gradient), ((want, want_scores), expected) = (
    loss_and_gradient(model, batch) for batch in (packed, alone)
  )
  np.testing.assert_allclose(loss, want, rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), scores, want_scores)
  for a, b in zip(*(jax.tree.leaves(nnx.state(g, nnx.Param)) for g in (gradient, expected)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(np.abs(b).max()))
  mixed = {name: x for name, x in packed.items() if name != "segment_BL"}
  assert abs(float(loss_and_gradient(model, mixed)[0][0]) - want) > 1e-3 * want


def test_every_example_is_whole_in_a_row_of_its_task():
  packed, alone = rows(True), rows(False)
  text = lambda batch, row, where: tuple(
    tuple(batch[name][row][where].tolist()) for name in ("tokens_BL", "targets_BL", "is_target_BL")
  )
  found = []
  for b, mask_L in enumerate(packed["mask_BL"]):
    for number in np.unique(packed["segment_BL"][b][mask_L]):
      here = (packed["segment_BL"][b] == number) & mask_L
      assert (np.diff(np.flatnonzero(here)) == 1).all()
      found.append((int(packed["domain_B"][b]), text(packed, b, here)))
  expected = [
    (int(domain), text(alone, b, alone["mask_BL"][b])) for b, domain in enumerate(alone["domain_B"])
  ]
  assert sorted(found) == sorted(expected)


def test_examples_go_to_the_first_row_with_room():
  row_of, begin_of, number = place([10, 10, 8, 9, 2], [0, 0, 0, 1, 0], 20)
  assert (row_of, begin_of, number) == ([0, 0, 1, 2, 1], [0, 10, 0, 0, 8], 3)


def test_what_looks_into_another_text_is_refused():
  batch = rows(True)
  config = dataclasses.replace(models.CONFIG, mixer="lightning")
  with pytest.raises(InputError, match=r"mixer lightning: its state goes on .* --pack_examples=false"):
    model = Transformer(config, TOKENIZER.vocab_size, rngs=nnx.Rngs(0))
    jax.eval_shape(lambda: Response()(model, batch, Context.of_batch(batch, num_domains=9)).loss)
  config = dataclasses.replace(models.CONFIG, mtp_depth=1)
  with pytest.raises(InputError, match=r"objective next_tokens: looks from one text .* into the next"):
    model = Transformer(config, TOKENIZER.vocab_size, rngs=nnx.Rngs(0))
    jax.eval_shape(lambda: NextTokens()(model, batch, Context.of_batch(batch, num_domains=9)).loss)
