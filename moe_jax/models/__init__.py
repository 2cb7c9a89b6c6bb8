"""Named configurations: `--preset=NAME` sets every flag that the command line does not. One file per family.

Every published model also exists as NAME_tiny, which has the same parts at toy size. docs/models.md has a table of
them.
"""

from moe_jax.config import Config
from moe_jax.errors import unknown_name
from moe_jax.models import (
  deepseek,
  encoder_decoders,
  gpt_oss,
  kimi,
  laptop,
  minimax,
  mixtral,
  olmoe,
  qwen,
)
from moe_jax.models.settings import Published

_FAMILIES = (laptop, mixtral, deepseek, kimi, minimax, qwen, olmoe, gpt_oss, encoder_decoders)
PRESETS: dict[str, Config] = {name: config for family in _FAMILIES for name, config in family.PRESETS.items()}
# V of each preset where no tokenizer says it: for counting and compiling, not for training.
VOCAB_SIZES: dict[str, int] = {name: v for family in _FAMILIES for name, v in family.VOCAB_SIZES.items()}
# What the authors of a model say about its size.
PUBLISHED: dict[str, Published] = {name: p for family in _FAMILIES for name, p in family.PUBLISHED.items()}


def preset(name: str) -> Config:
  """The preset of that name. Raises `InputError` naming the known ones."""
  if name not in PRESETS:
    raise unknown_name("preset", name, PRESETS)
  return PRESETS[name]
