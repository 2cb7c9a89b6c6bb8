"""Chat templates: the text, the tokens and the targets of ours and of `apply_chat_template`."""

import numpy as np
import pytest
import tokenizers

from moe_jax.config import DataConfig
from moe_jax.data.chat import read_chat_template
from moe_jax.data.prompts import Example, encode_example, prompt_dataset
from moe_jax.data.tokenizers import ModelIds, load_tokenizer
from tests.parity import oracles

SPECIALS = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"]
TEXT = ["Sum up these words: the quick brown fox", "and the answer is yes\n\nor no, of course"] * 3
EXAMPLES = [
  Example("Sum up these words", "the fox"),
  Example("  two lines\nwith {{ 1 }} and <b>  ", "yes\n\nor no, <i>of course</i>"),
  Example("Größe? ☃", " a word with a space before it "),
]

# In the manner of ChatML, with a generation prompt.
CHATML = """{%- for message in messages %}
  {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
# The same, and it says what the assistant writes, by which transformers makes a mask.
MARKED = """{%- for message in messages %}
  {{- '<|im_start|>' + message.role + '\\n' }}
  {%- if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' + '\\n' }}{% endgeneration %}
  {%- else %}{{- message.content + '<|im_end|>' + '\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
# Special tokens by name. Their turns must alternate.
NAMED = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}
{% endfor %}
"""
# A system message where there is none, of a namespace, and tools where there are some.
SYSTEM = """{%- set ns = namespace(system='You help.') %}
{%- for message in messages %}
  {%- if message.role == 'system' %}{%- set ns.system = message.content %}{%- break %}{%- endif %}
{%- endfor %}
{{- bos_token + '<|im_start|>system\\n' + ns.system + ('' if tools is none else tools | tojson) + '<|im_end|>\\n' }}
{%- for message in messages if message.role != 'system' %}
  {{- '<|im_start|>' + message.role + '\\n' + message.content | string + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
# Contents are trimmed, and what they are is written as JSON.
TRIMMED = """{%- for message in messages -%}
  <|im_start|>{{ {'role': message.role} | tojson }}
  {{- message.content | trim }}<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>{{ {'role': 'assistant'} | tojson }}{%- endif -%}
"""
TEMPLATES = {"chatml": CHATML, "marked": MARKED, "named": NAMED, "system": SYSTEM, "trimmed": TRIMMED}


def byte_level():
  """As in GPT-2: bytes, merged within words."""
  made = tokenizers.Tokenizer(tokenizers.models.BPE())
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = tokenizers.decoders.ByteLevel()
  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=330, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
  )
  made.train_from_iterator(TEXT, trainer)
  return made


def with_space_before():
  """As in Llama 2: a text begins with a space, which its second half does not."""
  made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True))
  made.normalizer = tokenizers.normalizers.Sequence(
    [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
  )
  fallback = [f"<0x{byte:02X}>" for byte in range(256)]
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=400, special_tokens=["<unk>", *SPECIALS, *fallback], show_progress=False
  )
  made.train_from_iterator(TEXT, trainer)
  return made


@pytest.fixture(scope="module", params=[byte_level, with_space_before], ids=lambda make: make.__name__)
def saved(request, tmp_path_factory):
  """The folder of a tokenizer, and the one of transformers that wrote it."""
  folder = tmp_path_factory.mktemp("tokenizer")
  names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
  theirs = oracles.transformers.PreTrainedTokenizerFast(tokenizer_object=request.param(), **names)
  theirs.save_pretrained(folder)
  return folder, theirs


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_tokens_and_targets_are_those_of_transformers(saved, name):
  folder, theirs = saved
  (folder / "chat_template.jinja").write_text(TEMPLATES[name], encoding="utf-8")
  theirs.chat_template = TEMPLATES[name]
  tokenizer = load_tokenizer(str(folder / "tokenizer.json"), ModelIds(512))
  template = read_chat_template(folder)
  for example in EXAMPLES:
    user = [{"role": "user", "content": example.prompt}]
    both = [*user, {"role": "assistant", "content": example.response}]
    write = lambda messages, **options: theirs.apply_chat_template(messages, tokenize=False, **options)
    before, response = template.split(example.prompt, example.response)
    assert before == write(user, add_generation_prompt=True) and before + response == write(both)

    found = encode_example(example, tokenizer, tokenizer.bos_id, template)
    expected = theirs.apply_chat_template(both, return_dict=False)
    np.testing.assert_array_equal(found.ids, expected)
    # The offsets of the tokens are an oracle of where the response begins.
    offsets = theirs(write(both), add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert found.first == next(i for i, (_, end) in enumerate(offsets) if end > len(before))


def test_the_targets_of_a_row_are_the_mask_that_transformers_makes(saved):
  folder, theirs = saved
  (folder / "chat_template.jinja").write_text(MARKED, encoding="utf-8")
  theirs.chat_template = MARKED
  tokenizer = load_tokenizer(str(folder / "tokenizer.json"), ModelIds(512))
  data = prompt_dataset(
    DataConfig(sequence_length=160, batch_size=1),
    EXAMPLES[1:],
    EXAMPLES[:1],
    tokenizer,
    template=read_chat_template(folder),
  )
  (batch,) = data.validation_batches()
  messages = [
    {"role": r, "content": text} for r, text in zip(("user", "assistant"), EXAMPLES[0][:2], strict=True)
  ]
  expected = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
  n = len(expected["input_ids"]) - 1
  np.testing.assert_array_equal(batch["targets_BL"][0, :n], expected["input_ids"][1:])
  np.testing.assert_array_equal(batch["is_target_BL"][0, :n], np.array(expected["assistant_masks"][1:], bool))
  assert 0 < batch["is_target_BL"][0].sum() < n and batch["mask_BL"][0].sum() == n
