"""The flags by which a script opens a model (`--model`, `--mesh`, `--plugins`) and the text that the model reads."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from absl import flags

from moe_jax.config import DataConfig, MeshConfig
from moe_jax.errors import InputError, unknown_name

if TYPE_CHECKING:
  from moe_jax.data import Dataset
  from moe_jax.training.load import Loaded


_BATCH_SIZE = 16  # windows at a time of text that is not that of the run


def define_flags() -> None:
  flags.DEFINE_string(
    "model",
    "",
    "folder of a run (in the folder of a comparison, arms/ARM/seed_SEED) or of a Hugging Face checkpoint",
  )
  flags.DEFINE_enum(
    "dtype", "float32", ("float32", "bfloat16"), "of the parameters of a Hugging Face checkpoint"
  )
  flags.DEFINE_list("mesh", [], "devices along each mesh axis, e.g. data=2,expert=4; default: one device")
  flags.DEFINE_list("plugins", [], "Python files or modules that register methods of your own")


def define_data_flags(batch_size: int | None = None, eval_batches: int | None = None) -> None:
  """Defines the flags of `open_dataset`, with these defaults. None: `scored_batches` says them."""
  flags.DEFINE_string(
    "dataset", "", "stdlib, markov, text_folder or a TFDS name; default: that of the run, or stdlib"
  )
  flags.DEFINE_string("text_folder", "", "for --dataset=text_folder: one folder per domain")
  flags.DEFINE_string("data_dir", "", "where data sets are; default: as in the run")
  flags.DEFINE_integer("sequence_length", 0, "tokens of a window; 0: as in the run, or 128")
  said = lambda default, text: (
    "" if default is not None else f"; default: as in the run on its text, or {text}"
  )
  size, number = said(batch_size, f"{_BATCH_SIZE}"), said(eval_batches, "0")
  flags.DEFINE_integer("batch_size", batch_size, f"windows at a time{size}", lower_bound=1)
  flags.DEFINE_integer(
    "eval_batches", eval_batches, f"batches of the validation split; 0: all{number}", lower_bound=0
  )


def scored_batches(loaded: "Loaded") -> tuple[int, int]:
  """Returns the batch size and the number of batches that the flags name, 0 for all.

  Where they do not, they are those of the evaluations of a run if its own text is read, so that the numbers are those of
  its result: as many windows, whatever the batch size. Otherwise the whole split is read.
  """
  from moe_jax.inference.model import rows_of_mesh

  values, data, own = flags.FLAGS, data_config(loaded), loaded.config.data
  parts = lambda config: (config.dataset, config.text_folder, config.sequence_length)
  is_own = loaded.step and parts(data) == parts(own)
  size = values["batch_size"].value or (own.batch_size if is_own else _BATCH_SIZE)
  number, rows = values["eval_batches"].value, rows_of_mesh()
  if number is None:
    windows = loaded.config.train.eval_batches * own.batch_size if is_own else 0
    number = -(-windows // (-(-size // rows) * rows))
  return size, number


def open_dataset(loaded: "Loaded") -> "Dataset":
  """Returns the data set that the flags name, cut with the tokenizer of the model.

  Raises:
    InputError: if there is no such data set, its ids are no text that the model reads, a router reads domains that it
      does not know, or a flag is wrong.
  """
  from moe_jax.config.fields import positive
  from moe_jax.data import load_dataset
  from moe_jax.data.loading import check_same_ids, text_of_run
  from moe_jax.data.tokenizers import missing_tokenizer

  values, own, data = flags.FLAGS, loaded.config.data, data_config(loaded)
  positive(data, "batch_size", "sequence_length")
  check_same_ids(own.dataset, data.dataset)
  if loaded.tokenizer is None:
    raise InputError(f"--model={missing_tokenizer(loaded.folder)}")
  # A tokenizer that was trained on this very data set comes with it, and has the tokens cached.
  is_own = own.bpe_size and (data.dataset, data.text_folder) == (own.dataset, own.text_folder)
  tokenizer = None if is_own else loaded.tokenizer
  if values["dataset"].value or values["text_folder"].value:
    return loaded.as_trained(load_dataset(data, tokenizer))
  return loaded.as_trained(text_of_run(loaded.folder, data, tokenizer))


def data_config(loaded: "Loaded") -> DataConfig:
  """Returns the configuration of the data set that the flags name, or that of the run. Nothing is opened."""
  names = ("dataset", "text_folder", "data_dir", "sequence_length", "batch_size")
  given = {name: flags.FLAGS[name].value for name in names if flags.FLAGS[name].value}
  return dataclasses.replace(loaded.config.data, **given)


@contextlib.contextmanager
def open_stream() -> "Iterator[Loaded]":
  """Opens the checkpoint that the flags name as a `LayerStream`, in place of the model of what `open_model` yields.

  Raises:
    InputError: if there is no such checkpoint, or it is the folder of a run.
  """
  import pathlib

  from moe_jax.interop.stream import LayerStream
  from moe_jax.training.load import Loaded

  if not flags.FLAGS.model:
    raise InputError("--model: give the folder of a Hugging Face checkpoint")
  if flags.FLAGS.mesh:
    raise InputError(f"--mesh={','.join(flags.FLAGS.mesh)}: a stream uses one device; leave out --stream")
  stream = LayerStream(flags.FLAGS.model, flags.FLAGS.dtype)
  yield Loaded(stream, stream.config, stream.tokenizer, 0, pathlib.Path(flags.FLAGS.model).expanduser())


@contextlib.contextmanager
def open_model() -> "Iterator[Loaded]":
  """Loads the model that the flags name, with its mesh in use.

  Raises:
    InputError: if there is no such model, or the mesh does not fit the devices or the model.
  """
  if not flags.FLAGS.model:
    raise InputError(
      "--model: give the folder of a run or of a Hugging Face checkpoint, e.g. --model=runs/one/arms/none/seed_0"
    )
  import jax  # here, so that invalid flags fail immediately

  from moe_jax import sharding
  from moe_jax.interop.load import load

  with contextlib.ExitStack() as stack:
    with _naming_mesh():
      if flags.FLAGS.mesh:
        mesh = sharding.make_mesh(mesh_config(flags.FLAGS.mesh))
        stack.enter_context(jax.set_mesh(mesh))
      loaded = load(flags.FLAGS.model, flags.FLAGS.dtype)
      if flags.FLAGS.mesh:
        parts = mesh.size  # the batch is made to fit, so only the model is checked
        sharding.check_divides(mesh, loaded.config.model, micro_batch=parts, num_groups=parts)
    yield loaded


@contextlib.contextmanager
def _naming_mesh() -> Iterator[None]:
  """Names `--mesh` in errors, in place of the flags by which other scripts say the sizes of a mesh."""
  try:
    yield
  except InputError as error:
    text, count = re.subn(r"--(\w+)_parallelism=(-?\d+)", r"--mesh=\1=\2", str(error))
    if not count:
      raise
    text = text.replace(", --mesh=", ",")
    raise InputError(re.sub(r"--(?!mesh=)(\w+=)", r"\1", text)) from None  # a size of the model is no flag


def mesh_config(pairs: list[str]) -> MeshConfig:
  """Returns the mesh of `["data=2", "expert=4"]`. Axes that are not named have one device."""
  axes = [field.name for field in dataclasses.fields(MeshConfig)]
  sizes = dict.fromkeys(axes, 1)
  for pair in pairs:
    name, _, size = pair.partition("=")
    if name not in axes:
      raise unknown_name("axis of --mesh", name, axes)
    try:
      sizes[name] = int(size)
    except ValueError:
      raise InputError(f"--mesh={','.join(pairs)}: {name} needs a number of devices, e.g. {name}=2") from None
  return MeshConfig(**sizes)
