"""`load_dataset` opens the `Dataset` that a `DataConfig` describes."""

import functools
import pathlib
from collections.abc import Callable

from moe_jax import disk
from moe_jax.config import DataConfig
from moe_jax.data.bpe import BpeCache
from moe_jax.data.cache import cache_dir, data_dir
from moe_jax.data.dataset import Dataset, dataset_of_texts
from moe_jax.data.markov import load_markov
from moe_jax.data.prompts import fits_row, prompt_dataset
from moe_jax.data.text_folder import read_text_folder
from moe_jax.data.tokenizers import Tokenizer, load_tokenizer
from moe_jax.errors import InputError


def load_dataset(config: DataConfig, tokenizer: Tokenizer | None = None) -> Dataset:
  """Builds or opens the data set that `config.dataset` names.

  stdlib, text_folder and small TFDS data sets are tokenised here and held in memory. Windows of markov and large
  TFDS data sets are produced while they are read. The first stdlib build takes seconds and is cached.

  Args:
    config: which data set, and how it is cut.
    tokenizer: of a model that reads the text; None: the one that `config.tokenizer` names.

  Raises:
    InputError: if a flag is wrong.
  """
  config.check()
  if config.dataset in _BUILT_IN:
    return _BUILT_IN[config.dataset](config, tokenizer)
  from moe_jax.data.tfds_text import load_tfds

  return load_tfds(config, config.data_dir or str(data_dir(config)), tuple(_BUILT_IN), tokenizer)


def check_same_ids(was: str, now: str) -> None:
  """Checks that a model can read a data set, as far as their names tell.

  Args:
    was: the data set of the model.
    now: the data set to be read.

  Raises:
    InputError: if one is markov and the other text. Ids of both may fit into the model, but mean other things.
  """
  if now == "markov" != was:
    raise InputError(
      "--dataset=markov: its token ids stand for no text, and the model reads text; choose a data set of text"
    )
  if was == "markov" != now:
    raise InputError(
      f"--dataset={now}: is text, and the model reads the token ids of markov, which stand for none; use --dataset=markov"
    )


def text_of_run(folder: pathlib.Path, config: DataConfig, tokenizer: Tokenizer | None) -> Dataset:
  """Returns the data set that the configuration of a run names. One line says if the run was on other text.

  Args:
    folder: of the run. A published checkpoint and a run of an earlier version do not say what their text was.
    config, tokenizer: as in `load_dataset`.

  Raises:
    InputError: if the data set cannot be opened, such as one of a user's that the run got from Python.
  """
  say = "say which text to read with --dataset or --text_folder"
  was = (disk.read_object(folder / "config.json") or {}).get("fingerprint")
  try:
    dataset = load_dataset(config, tokenizer)
  except InputError as error:
    raise (InputError(f"{error}; {folder} is a run on it: {say}") if was else error) from None
  now = dataset.info.fingerprint
  if was and was != now:
    disk.note(
      f"{folder}: was on other text than {dataset.info.name}, which is read now (fingerprint {str(was)[:12]}, now "
      f"{now[:12]}): a data set of one's own, another Python version or changed files; {say}"
    )
  return dataset


def _load_stdlib(config: DataConfig, tokenizer: Tokenizer | None) -> Dataset:
  try:
    from moe_jax.data.stdlib_builder import read_stdlib
  except ImportError as error:
    install = "pip install tensorflow-datasets array_record"
    raise InputError(f"--dataset=stdlib: needs {error.name}, run: {install}") from None
  try:
    splits, domains = read_stdlib(data_dir(config))
  except (PermissionError, FileExistsError, NotADirectoryError) as error:
    raise InputError(
      f"--data_dir={data_dir(config)}: must be a folder that can be written ({error.strerror})"
    ) from None
  flag = ("sequence_length", str(config.sequence_length))
  return dataset_of_texts(config, "stdlib", splits, domains, flag, tokenizer)


def _load_text_folder(config: DataConfig, tokenizer: Tokenizer | None) -> Dataset:
  splits, domains = read_text_folder(config.text_folder)
  return dataset_of_texts(
    config, "text_folder", splits, domains, ("text_folder", config.text_folder), tokenizer
  )


def _load_stdlib_tasks(config: DataConfig, tokenizer: Tokenizer | None) -> Dataset:
  from moe_jax.data.stdlib_tasks import read_tasks

  splits = read_tasks([name for name in config.held_out_tasks.split(",") if name])
  texts = [f"{example.prompt}{example.response}" for example in splits["train"]]
  if tokenizer is None:
    size = config.bpe_size
    tokenizer = (
      BpeCache(texts, size, cache_dir(config)).tokenizer if size else load_tokenizer(config.tokenizer)
    )
  fits = functools.partial(fits_row, tokenizer=tokenizer, length=config.sequence_length)
  short = {split: list(filter(fits, examples)) for split, examples in splits.items()}
  for split, examples in short.items():
    if not examples:
      raise InputError(
        f"--sequence_length={config.sequence_length}: no {split} example of stdlib_tasks is so short; choose more"
      )
  return prompt_dataset(config, short["train"], short["validation"], tokenizer, name="stdlib_tasks")


def _load_markov(config: DataConfig, tokenizer: Tokenizer | None) -> Dataset:
  del tokenizer  # its token ids stand for no text
  return load_markov(config)


_BUILT_IN: dict[str, Callable[[DataConfig, Tokenizer | None], Dataset]] = {
  "stdlib": _load_stdlib,
  "stdlib_tasks": _load_stdlib_tasks,
  "markov": _load_markov,
  "text_folder": _load_text_folder,
}
