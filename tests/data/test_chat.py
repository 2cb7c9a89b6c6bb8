"""Chat templates: what they write, what of it is the response, and that they run in a sandbox."""

import json

import numpy as np
import pytest

from moe_jax.config import DataConfig
from moe_jax.data.chat import ChatTemplate, read_chat_template
from moe_jax.data.prompts import Example, prompt_dataset
from moe_jax.data.tokenizers import load_tokenizer
from moe_jax.errors import InputError

# The form of ChatML, as Qwen's template has it.
CHATML = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
# The form of Mistral's: turns must alternate, and special tokens are named.
INST = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}
{% endfor %}"""


def test_prompt_and_response_are_the_turns_of_user_and_assistant():
  before, response = ChatTemplate(CHATML).split("Hi {{ 1 }}", "a <b>\n")
  assert before == "<|im_start|>user\nHi {{ 1 }}<|im_end|>\n<|im_start|>assistant\n"
  assert response == "a <b>\n<|im_end|>\n"
  specials = {"bos_token": "<s>", "eos_token": "</s>"}
  assert ChatTemplate(INST, specials).split("Hi", "yes") == ("<s>[INST] Hi [/INST]", " yes</s>")


def test_the_row_is_what_the_template_writes_and_nothing_else():
  tokenizer = load_tokenizer("bytes")
  examples = [Example("p", "rr")], [Example("q", "ss")]
  config = DataConfig(sequence_length=80, batch_size=1)
  dataset = prompt_dataset(config, *examples, tokenizer, template=ChatTemplate(CHATML))
  (batch,) = dataset.validation_batches()
  text = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nss<|im_end|>\n"
  n = len(text) - 1
  assert tokenizer.decode(batch["tokens_BL"][0, :n]) == text[:-1] and batch["mask_BL"][0].sum() == n
  targets = batch["targets_BL"][0][batch["is_target_BL"][0]]
  assert tokenizer.decode(targets) == "ss<|im_end|>\n"
  plain = prompt_dataset(config, *examples, tokenizer)
  assert plain.info.fingerprint != dataset.info.fingerprint
  np.testing.assert_array_equal(next(plain.validation_batches())["tokens_BL"][0, 0], tokenizer.bos_id)


def test_it_is_read_from_the_folder_of_a_model(tmp_path):
  assert read_chat_template(tmp_path) is None
  config = tmp_path / "tokenizer_config.json"
  config.write_text(json.dumps({"eos_token": {"content": "</s>"}, "bos_token": "<s>", "chat_template": INST}))
  assert read_chat_template(tmp_path).split("Hi", "yes")[1] == " yes</s>"
  named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
  config.write_text(json.dumps({"chat_template": named}))
  assert read_chat_template(tmp_path).source == CHATML
  (tmp_path / "chat_template.jinja").write_text(INST)
  assert read_chat_template(tmp_path).source == INST


@pytest.mark.parametrize(
  ("source", "match"),
  [
    ("{% for %}", "is no chat template"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", r"fails on a prompt .*unsafe"),
    ("{{ messages.append(1) }}", r"fails on a prompt .*(unsafe|not safe)"),
    ("{{ raise_exception('only tools') }}", "fails on a prompt with a response .only tools"),
    ("{{ open('/etc/passwd') }}", "'open' is undefined"),
    ("{% for i in range(10**9) %}x{% endfor %}", "fails on a prompt with a response .Range too big"),
    ("always the same", "does not write a response behind a prompt; use --chat_template=false"),
  ],
)
def test_a_template_that_is_wrong_or_does_more_than_write_is_refused(source, match):
  with pytest.raises(InputError, match=match) as error:
    ChatTemplate(source, where="t.jinja").split("p", "r")
  assert str(error.value).startswith("t.jinja: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
  "source",
  ["{{" + "(" * 30_000, "{{" + "not " * 16_000 + "1}}", "{% for x in y %}" * 40 + "{% endfor %}" * 40],
)
def test_templates_that_are_nested_too_deeply(source):
  with pytest.raises(InputError, match=r"^chat template: is no chat template \(") as error:
    ChatTemplate(source)
  assert len(str(error.value)) < 200


def test_a_deeply_nested_tokenizer_config_is_no_json(tmp_path):
  (tmp_path / "tokenizer_config.json").write_text("[" * 100_000)
  with pytest.raises(InputError, match=r"tokenizer_config.json: is no JSON$"):
    read_chat_template(tmp_path)
