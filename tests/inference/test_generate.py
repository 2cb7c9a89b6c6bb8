"""Text that follows a prompt: what it must equal, where it ends, what it does not depend on, and wrong input."""

import dataclasses
import functools
import itertools
import re

import jax
import numpy as np
import pytest
from flax import nnx

from moe_jax import sharding
from moe_jax.config import BlockConfig, MeshConfig, ModelConfig, MoEConfig, Segment
from moe_jax.data.tokenizers import load_tokenizer
from moe_jax.errors import InputError
from moe_jax.inference import generate as generation
from moe_jax.inference.generate import Sampling, generate, generate_tokens, left_padded, stream
from moe_jax.inference.model import dropless, on_mesh
from moe_jax.inference.text import TextSoFar
from moe_jax.nn import Transformer
from moe_jax.training.load import Loaded
from tests.nn.layer import randomized

BYTES = load_tokenizer("bytes")
V, NEW = BYTES.vocab_size, 11
# A dispatcher and groups that would drop most assignments, and cannot be cut into groups of one token.
MOE = MoEConfig(
  num_experts=4, num_experts_per_token=2, expert_dim=8, dispatcher="sorted", eval_capacity_factor=0.5, group_size=8
)  # fmt: skip
CONFIG = ModelConfig(
  model_dim=16, num_heads=2, num_kv_heads=2, head_dim=8, dense_dim=16, remat="none", moe=MOE,
  segments=(Segment(tuple(BlockConfig(mixer) for mixer in ("lightning:chunk=4", "attention:window=4", "mla"))),),
)  # fmt: skip
PROMPTS = [[5, 9, 200, 31, 7], [77], [3, 1, 4, 1, 5, 9, 2, 6, 5]]


def make(**fields):
  config = dataclasses.replace(CONFIG, **fields)
  return randomized(lambda: Transformer(config, V, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def model():
  return make()


@pytest.fixture(scope="module")
def small():
  """One layer, which compiles faster."""
  return make(segments=(Segment((BlockConfig("attention"),)),))


def collect(*args, **options):
  return joined(list(generate_tokens(*args, **options)))


def joined(pieces):
  return [list(itertools.chain(*of_prompt)) for of_prompt in zip(*pieces, strict=True)]


@functools.cache
def most_likely():
  """Each prompt by itself, token by token, with the whole forward pass of the model without drops."""
  moe = dataclasses.replace(MOE, dispatcher="dropless", group_size=0)
  model = make(moe=moe)
  forward = jax.jit(lambda model, tokens_BL: model(tokens_BL)[0])
  found = []
  for prompt in PROMPTS:
    tokens = list(prompt)
    for _ in range(NEW):
      row = np.zeros((1, 24), np.int32)
      row[0, : len(tokens)] = tokens
      tokens.append(int(np.argmax(forward(model, row)[0, len(tokens) - 1])))
    found.append(tokens[len(prompt) :])
  return found


def test_a_batch_of_prompts_gets_what_the_whole_forward_pass_says_of_each(model):
  before = jax.device_get(nnx.state(model))
  assert collect(model, PROMPTS, NEW, tokens_per_call=4) == most_likely()
  jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(nnx.state(model)))
  assert model.segments[0].pattern.blocks[0].ffn.group_size == 8


def test_eight_devices_say_the_same(model):
  """Experts, heads, the stored parameters and the batch are split; three prompts do not divide over four devices."""
  expected = most_likely()
  with jax.set_mesh(sharding.make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))):
    assert collect(model, PROMPTS, NEW, tokens_per_call=4) == expected
    graphdef, state = nnx.split(on_mesh(dropless(model)))
    tokens_BL, pad_B = left_padded(PROMPTS, 4)
    choice = generation._choice(Sampling(), 4)
    _, cache = generation._prefill(graphdef, state, tokens_BL, pad_B, choice, 32, 0)
  lightning, (keys, values), latent = cache.layers[0]
  parts = lambda x: tuple(whole // part for whole, part in zip(x.shape, x.addressable_shards[0].data.shape))
  assert parts(lightning) == (1, 4, 2, 1, 1)  # sequences, heads
  assert parts(keys) == parts(values) == (1, 4, 1, 2, 1) and parts(latent) == (1, 4, 1, 1)


def test_tokens_come_as_they_are_made_and_end_where_they_should(model):
  """At a stop token, which is not part of the text, and at the last new one, whatever a call makes."""
  expected = most_likely()
  stop = expected[2][7]
  assert all(stop not in tokens for tokens in (*expected[:2], expected[2][:7]))
  pieces = list(generate_tokens(model, PROMPTS, NEW - 1, stop_ids=[stop], tokens_per_call=4))
  assert [[len(tokens) for tokens in step] for step in pieces] == [[1, 1, 1], [4, 4, 4], [4, 4, 2], [1, 1, 0]]
  assert joined(pieces) == [expected[0][: NEW - 1], expected[1][: NEW - 1], expected[2][:7]]
  only = list(generate_tokens(model, PROMPTS[:1], NEW, stop_ids=[expected[0][0]], tokens_per_call=4))
  assert only == [[[]]]  # nothing else is waited for


def test_what_is_drawn_depends_on_the_seed_and_not_on_other_prompts(small):
  sampling = Sampling(temperature=9.0, top_k=40, top_p=0.95, seed=3)
  drawn = collect(small, PROMPTS, NEW, sampling=sampling)
  assert all(len(set(tokens)) > NEW // 2 for tokens in drawn)  # another draw at every position
  assert collect(small, PROMPTS[:1], NEW, sampling=sampling) == drawn[:1]
  other = dataclasses.replace(sampling, seed=4)
  assert collect(small, PROMPTS, NEW, sampling=other) != drawn


def loaded_with(model, **fields):
  given = {"tokenizer": BYTES, "step": 0, "folder": "runs/one", "max_positions": 32}
  return Loaded(model, None, **given | fields)


def test_text_is_that_of_the_tokens(small):
  """Behind the token that begins a document; in pieces and as a whole, of one prompt and of several."""
  loaded, texts = loaded_with(small), ["hé", "abc"]
  ids = [[BYTES.bos_id, *text.encode()] for text in texts]
  expected = [
    bytes(t for t in tokens if t < 256).decode(errors="replace") for tokens in collect(small, ids, NEW)
  ]
  assert generate(loaded, texts, NEW) == expected
  assert generate(loaded, texts[0], NEW) == expected[0]
  assert generate(loaded._replace(stop_ids=tuple(range(V))), texts, NEW) == ["", ""]
  first, _ = collect(small, [list(texts[0].encode()), ids[1]], NEW)
  assert generate(loaded, texts[0], NEW, begin=False, stop_ids=()) == bytes(
    t for t in first if t < 256
  ).decode(errors="replace")
  pieces = list(stream(loaded, texts, max_new_tokens=NEW))
  assert ["".join(piece.text for piece in of_prompt) for of_prompt in zip(*pieces, strict=True)] == expected
  assert sum(len(piece.tokens) for piece in pieces[0]) == 2


def test_without_a_token_that_begins_a_document_there_is_none(small):
  """Neither before a prompt, nor to stop at: token 0 is an ordinary one."""
  numbers = BYTES._replace(bos_id=None, decode=lambda tokens: " ".join(map(str, tokens)))
  loaded = loaded_with(small, tokenizer=numbers)
  (tokens,) = collect(small, [list(b"abc")], NEW)
  assert generate(loaded, "abc", NEW).split() == [str(token) for token in tokens]
  with pytest.raises(InputError, match="prompt 0 has no token"):
    generate(loaded, "", NEW)


def test_half_a_character_is_held_back():
  text = TextSoFar(BYTES.decode, "é".encode()[:1])
  first, second, third = "é€".encode()[1:2], "é€".encode()[2:4], "é€".encode()[4:]
  assert [text.add(list(part)) for part in (first, second, third, b"a", b"\xc3")] == ["", "", "€", "a", ""]
  assert text.rest() == "\ufffd"


@pytest.mark.parametrize(
  "fields, prompts, options, message",
  [
    (
      {},
      [[1] * 20],
      {"max_length": 30},
      "prompt 0 has 20 tokens, and with 11 new ones .* max_length=30 .*=10 or",
    ),
    ({}, [[1], [1] * 40], {"max_length": 30}, "prompt 1 has 40 tokens.*; shorten it"),
    ({}, [[1], []], {}, "prompt 1 has no token"),
    ({}, [], {}, "there is no prompt"),
    ({}, [[1]], {"max_new_tokens": 0}, "--max_new_tokens=0: must be positive"),
    ({"causal": False, "segments": ()}, [[1]], {}, r"sees later tokens \(objective masked_lm\)"),
    (
      {"segments": (), "moe": dataclasses.replace(MOE, router="expert_choice", accept_leaks="expert_choice")},
      [[1]],
      {},
      "with --router=expert_choice an output depends on later tokens",
    ),
    (
      {"segments": (), "moe": dataclasses.replace(MOE, router="task_level:tasks=2")},
      [[1]],
      {},
      "--router=task_level:2 reads the domain of each sequence, which a prompt does not have",
    ),
  ],
)
def test_what_cannot_be_generated_gets_one_line(fields, prompts, options, message):
  model = make(**fields)
  with pytest.raises(InputError, match=message) as error:
    collect(model, prompts, **{"max_new_tokens": NEW} | options)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "prompt, shown",
  [
    ([5, V], V),
    ([5, -3], -3),
    ([5, 2**70], "[5, 1180591620717411303424]"),
    ([5.7], "[5.7]"),
    (np.ones(2), "array([1., 1.])"),
    ([5, "a"], "[5, 'a']"),
    ([[5], [5, 6]], "[[5], [5, 6]]"),
    ("abc", "'abc'"),
    (5, 5),
  ],
)
def test_ids_that_the_model_has_not(prompt, shown, small):
  """As an id of a prompt, and as one that ends a text."""
  right = rf"has {re.escape(str(shown))}, and the ids of this model are integers from 0 to {V - 1}$"
  with pytest.raises(InputError, match=f"^generate: prompt 1 {right}"):
    collect(small, [[1], prompt], NEW)
  with pytest.raises(InputError, match=f"^--stop_ids {right}"):
    collect(small, [[1]], NEW, stop_ids=prompt)
  with pytest.raises(InputError, match=f"^--stop_ids {right}"):
    generate(loaded_with(small), "a", NEW, stop_ids=prompt)


def test_ids_of_any_integer_type(small):
  expected = collect(small, PROMPTS[:1], 4, stop_ids=[])
  for ids in (np.array(PROMPTS[0], np.uint16), jax.numpy.array(PROMPTS[0]), tuple(np.int64(PROMPTS[0]))):
    assert collect(small, [ids], 4) == expected
  for stop in (np.array(expected[0][1:2]), {expected[0][1]}, range(V)):
    assert collect(small, PROMPTS[:1], 4, stop_ids=stop) == [expected[0][: list(stop) == [expected[0][1]]]]


@pytest.mark.parametrize("temperature", [1e-30, 1e-37, 1.2e-38, 1e-38, 1e-45, 1e-300])
def test_a_temperature_near_0_is_that_of_0(temperature, small):
  for fields in ({}, {"top_k": 3, "top_p": 0.9}):
    sampling = Sampling(temperature, **fields)
    assert collect(small, PROMPTS, NEW, sampling=sampling) == collect(small, PROMPTS, NEW)


def test_wrong_settings_and_missing_parts_get_one_line(model):
  for field, value, message in (
    ("temperature", -1.0, "--temperature=-1.0: must be 0"),
    ("top_k", -1, "--top_k=-1: must be 0"),
    ("top_p", 0.0, r"--top_p=0.0: must be in \(0, 1\]"),
    ("seed", -1, "--seed=-1: must be an integer from 0 to 4294967295"),
    ("seed", 2**32, "--seed=4294967296: must be an integer from 0 to "),
    ("seed", 2**63, "--seed=9223372036854775808: must be an integer from 0 to "),
    ("seed", 0.5, "--seed=0.5: must be an integer from 0 to "),
  ):
    with pytest.raises(InputError, match=message):
      Sampling(**{field: value})
  with pytest.raises(
    InputError, match=r"runs/one: has no tokenizer.*moe_jax.inference.generate.generate_tokens$"
  ):
    generate(loaded_with(model, tokenizer=None), "a")
  with pytest.raises(InputError, match="prompt 0 has 31 tokens"):
    generate(loaded_with(model), "a" * 30, 10)


def test_a_model_compiles_once_however_often_it_generates(small):
  collect(small, [[1, 2, 3]], 4)
  before = generation._prefill._cache_size(), generation._decode._cache_size()
  collect(small, [[3, 2, 1]], 4)
  assert (generation._prefill._cache_size(), generation._decode._cache_size()) == before
