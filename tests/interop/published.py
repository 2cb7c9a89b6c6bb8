"""The folder of a tiny published model with a tokenizer, a chat template, and special tokens of its own names."""

import json
import pathlib

import tokenizers

import moe_jax
from moe_jax.config import ModelConfig
from tests.interop.helpers import MIXTRAL, random_model

SPECIALS = ("<begin>", "<end>", "<turn>")  # which no list of usual names has
CHATML = (
  "{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] }}<end>{% endfor %}"
  "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
BEGIN, END = 0, 1
V = 259  # all of them are in the tokenizer; no multiple of 8


def write_published(
  folder: pathlib.Path, config: ModelConfig = MIXTRAL, positions: int = 512
) -> pathlib.Path:
  """Writes a model whose vocabulary is full. Returns the folder."""
  moe_jax.save(random_model(config, V), folder)
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  vocab = {text: i for i, text in enumerate((*SPECIALS, *alphabet))}
  model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
  model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = tokenizers.decoders.ByteLevel()
  model.add_special_tokens(list(SPECIALS))
  model.save(str(folder / "tokenizer.json"))
  (folder / "chat_template.jinja").write_text(CHATML)
  (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
  path = folder / "config.json"
  ids = {"bos_token_id": BEGIN, "eos_token_id": END, "max_position_embeddings": positions}
  path.write_text(json.dumps(json.loads(path.read_text()) | ids))
  return folder
