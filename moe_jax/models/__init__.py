"""Named configurations: `--preset=NAME` sets every flag that the command line does not. One file per family."""

from moe_jax.config import Config
from moe_jax.errors import unknown_name
from moe_jax.models import encoder_decoders, laptop, mixtral, qwen

_FAMILIES = (laptop, mixtral, qwen, encoder_decoders)
PRESETS: dict[str, Config] = {name: config for family in _FAMILIES for name, config in family.PRESETS.items()}
# V of each preset where no tokenizer says it: for counting and compiling, not for training.
VOCAB_SIZES: dict[str, int] = {name: v for family in _FAMILIES for name, v in family.VOCAB_SIZES.items()}


def preset(name: str) -> Config:
  """The preset of that name. Raises `InputError` naming the known ones."""
  if name not in PRESETS:
    raise unknown_name("preset", name, PRESETS)
  return PRESETS[name]
