"""Named configurations: `--preset=NAME` sets every flag that the command line does not. One file per family."""

from moe_jax.config import Config
from moe_jax.errors import unknown_name
from moe_jax.presets import laptop, mixtral

PRESETS: dict[str, Config] = {**laptop.PRESETS, **mixtral.PRESETS}


def get_preset(name: str) -> Config:
  """The preset of that name. Raises `InputError` naming the known ones."""
  if name not in PRESETS:
    raise unknown_name("preset", name, PRESETS)
  return PRESETS[name]
