"""The tokenizer of a run: what its folder keeps of it, and how it is read back."""

import pathlib
from typing import Any

from moe_jax import disk
from moe_jax.config import DataConfig
from moe_jax.data import model_ids
from moe_jax.data.bpe import load_bpe
from moe_jax.data.tokenizers import Tokenizer, load_tokenizer
from moe_jax.errors import InputError, is_of_the_machine

# In the folder of a run, if the data set trained its own tokenizer, or that of a published model is such a file.
TOKENIZER_FILE = "tokenizer.json"


def write_tokenizer(folder: pathlib.Path, tokenizer: Tokenizer | None) -> dict[str, Any]:
  """Writes what the folder of a run keeps of its tokenizer. Returns what its config.json says of it.

  A tokenizer that was trained on the data set is a file of the folder. One of a published model comes with all its files,
  such as the chat template, and with the ids of that model.
  """
  if tokenizer is None:
    return {}
  if tokenizer.content is not None:
    disk.write_whole(folder / TOKENIZER_FILE, tokenizer.content)
  if tokenizer.ids is None:
    return {}
  model_ids.copy_files(tokenizer.folder, folder)
  return {model_ids.KEY: tokenizer.ids._asdict()}


def read_tokenizer(folder: pathlib.Path, data: DataConfig) -> Tokenizer:
  """Returns the tokenizer of the run in `folder`. One that is not in the folder is where it was.

  Raises:
    InputError: if it is missing or cannot be read.
  """
  ids = model_ids.read_ids(folder)
  if ids is not None:
    if file := model_ids.tokenizer_file(folder):
      return load_tokenizer(str(file), ids)
    raise InputError(
      f"{folder}: {TOKENIZER_FILE} or tokenizer.model is missing; copy it from the published model ({data.tokenizer})"
    )
  if not data.bpe_size:
    return load_tokenizer(data.tokenizer)
  try:
    return load_bpe((folder / TOKENIZER_FILE).read_bytes())
  except OSError as error:
    if is_of_the_machine(error):
      raise
    right = f"copy it from another run of --tokenizer={data.tokenizer} with the same fingerprint, or from the data folder"
    raise InputError(f"{folder}: {TOKENIZER_FILE} is missing; {right}") from None
