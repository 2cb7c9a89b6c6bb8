"""Saves a model as a checkpoint in Hugging Face's form, which transformers loads."""

import contextlib
import json
import logging
import os
import pathlib
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax import disk
from moe_jax.cluster.processes import first_writes, from_first
from moe_jax.config import ModelConfig
from moe_jax.data.model_ids import FILES, copy_files
from moe_jax.data.tokenizers import bytes_file
from moe_jax.errors import InputError, of_the_disk, of_the_system, require_option
from moe_jax.interop.describe import balancers_line, describe, dropping_line
from moe_jax.interop.families import Family
from moe_jax.interop.families.rope import yarn_positions
from moe_jax.interop.folder import CONFIG, INDEX, SINGLE, read_config
from moe_jax.interop.gather import fetch
from moe_jax.interop.load import DTYPES, is_run
from moe_jax.interop.names import Piece, Stored, bias_of, stored_parameters
from moe_jax.interop.place import copy
from moe_jax.interop.safetensors import Pending, write_file
from moe_jax.nn.transformer import Transformer
from moe_jax.training.load import CHECKPOINTS, Loaded

SHARD_BYTES = 5_000_000_000
_REPLACED = ("dtype", "torch_dtype", "quantization_config", "rope_parameters", "rope_scaling")


def save(
  model: Loaded | Transformer,
  folder: str | os.PathLike[str],
  format: str = "hf",
  dtype: str = "",
  shard_bytes: int = SHARD_BYTES,
) -> None:
  """Saves a model so that transformers, and `moe_jax.load`, can load it: config.json, weights and tokenizer files.

  Experts are written one by one, as the published checkpoints have them. Weights are written tensor by tensor, into
  one file, or into several with an index. Of several processes, all must call this: process 0 writes, and a host holds
  no more than one whole tensor at a time.

  Balancers that config.json of the family cannot hold, a capacity by which tokens are dropped, and noise of routers are
  named in warnings, which say how to continue with them.

  Args:
    model: what `moe_jax.load` returned, or a `Transformer`. With the first, tokenizer files are copied, and what only
      transformers reads of config.json stays. What was made of a published model has its tokenizer files and ids, too.
    folder: is created. It must not hold weights already, nor other files of a model or of a run, which would be taken
      for this one's. If saving fails, nothing is left in it.
    format: "hf".
    dtype: of the weights, float32 or bfloat16. Default: the type that config.json of a loaded checkpoint names,
      otherwise that of the parameters.
    shard_bytes: the size that a file has at most, unless one tensor is larger.

  Raises:
    InputError: if no published family is this model, its tokenizer has ids that it does not embed, the folder holds files
      of a model or run, or it cannot be written, or the disk is full.
  """
  require_option("save", "format", format, ("hf",))
  require_option("save", "dtype", dtype, ("", *DTYPES))
  loaded = model if isinstance(model, Loaded) else None
  folder, model = pathlib.Path(folder).expanduser(), model.model if loaded else model
  if taken := from_first(_taken(folder)):
    raise InputError(f"save: {folder} already holds {taken}; choose another folder")
  before = _values_before(loaded)
  weights = model.embedding_VD.get_value()
  family, values = describe(model.config, weights.shape[0], before.get("model_type", ""))
  dtype = dtype or before.get("dtype", before.get("torch_dtype", "")) or str(weights.dtype)
  dtype = dtype if dtype in DTYPES else "float32"
  for name in _REPLACED:
    before.pop(name, None)
  positions = _positions(loaded, model.config)
  values = before | values | ({"max_position_embeddings": positions} if positions else {})
  values |= {"torch_dtype": dtype}
  _check_ids(loaded, values)
  tensors = pending_tensors(model, family, np.dtype(jnp.dtype(dtype)))
  with first_writes("moe_jax.save") as mine:
    if not mine:
      for tensor in tensors.values():  # its parts go to process 0, in the order in which that writes them
        tensor.make()
      return
    with _filled(folder) as new:
      _copy_files(loaded, new)
      _write(new, tensors, shard_bytes)
      disk.write_text(new / CONFIG, json.dumps(values, indent=2) + "\n")
    for line in (balancers_line(model.config, family, values), dropping_line(model.config, family)):
      if line:
        logging.getLogger(__name__).warning(line)


def _taken(folder: pathlib.Path) -> str:
  """Returns what the folder has of a model or a run, in words; empty if a model may be written there."""
  if any(folder.glob("*.safetensors")) or os.path.exists(folder / INDEX):
    return "weights"
  found = (path.name for name in (CONFIG, CHECKPOINTS, *FILES) for path in sorted(folder.glob(name)))
  return next(found, "")


@contextlib.contextmanager
def _filled(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """A new folder in `folder` to fill, whose files get their place in `folder` when all are whole: weights first.

  So a kill leaves nothing in `folder` that another call would take for its own.
  """
  try:
    with disk.named(folder):
      folder.mkdir(parents=True, exist_ok=True)
      with tempfile.TemporaryDirectory(prefix=disk.WRITING, dir=folder) as new:
        yield pathlib.Path(new)
        files = sorted(pathlib.Path(new).iterdir(), key=lambda path: path.suffix != ".safetensors")
        for path in files:
          path.rename(folder / path.name)
  except OSError as error:
    if line := of_the_disk(error, str(folder), "begins it anew") or of_the_system(error):
      raise line from error
    raise


def _values_before(loaded: Loaded | None) -> dict[str, Any]:
  """The config.json of the checkpoint that the model came from. Of a run, only what its tokenizer and its model's ids say."""
  if loaded is None:
    return {}
  values = read_config(loaded.folder / CONFIG)
  if "model_type" in values:
    return values
  tokenizer = loaded.tokenizer
  if tokenizer is None:
    return {}
  if tokenizer.ids is None:
    return {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id}
  _, bos, pad, stops, _ = tokenizer.ids
  eos = stops[0] if len(stops) == 1 else list(stops) or None
  found = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
  return {name: value for name, value in found.items() if value is not None}


def _check_ids(loaded: Loaded | None, values: Mapping[str, Any]) -> None:
  """Raises `InputError` if config.json would have ids that the model does not embed."""
  size = values["vocab_size"]
  for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
    ids = values.get(name)
    if any(i >= size for i in (ids if isinstance(ids, list) else [ids]) if i is not None):
      raise InputError(
        f"save: the tokenizer of {loaded.folder} has {name}={ids}, and the model a vocabulary of {size}; use "
        "loaded._replace(tokenizer=moe_jax.load(FOLDER).tokenizer), of the published model that it was made of"
      )


def _positions(loaded: Loaded | None, config: ModelConfig) -> int:
  """The positions that the model was made for: what its checkpoint said, or those of YaRN, or of a run's texts; or 0."""
  known = loaded.max_positions if loaded else 0
  ids = loaded.tokenizer.ids if loaded and loaded.tokenizer else None
  of_checkpoint = ids.max_positions if ids else known if loaded and not is_run(loaded.folder) else 0
  return of_checkpoint or yarn_positions(config) or known


def pending_tensors(model: Transformer, family: Family, dtype: np.dtype) -> dict[str, Pending]:
  """Returns the tensors of the checkpoint, whose values are computed when they are written."""
  variables = dict(nnx.to_flat_state(nnx.state(model)))
  parts: dict[str, list[tuple[Any, Stored, Piece]]] = {}
  for stored in stored_parameters(model, family):
    value = bias_of(model, stored.path, variables[stored.path])
    value = jnp.zeros(stored.shape) if value is None else value  # of a balancer without a bias
    for piece in stored.pieces:
      parts.setdefault(piece.name, []).append((value, stored, piece))
  copies = family.copies(model.config)
  parts |= {copy: parts[name] for copy, name in copies.items()}
  of_name = lambda name: np.dtype(np.float32) if name.endswith(family.float32) else dtype
  return {name: _pending(own, of_name(name)) for name, own in parts.items()}


def _pending(parts: list[tuple[Any, Stored, Piece]], dtype: np.dtype) -> Pending:
  _, stored, piece = parts[0]
  shape = piece.layout.file_shape(stored.shape[len(piece.lead) :])

  def make() -> np.ndarray:
    tensor = np.empty(shape, dtype)
    for value, _, piece in parts:
      copy(*piece.layout.place(fetch(value, piece.lead), tensor))
    return tensor

  return Pending(shape, dtype, make)


def _write(folder: pathlib.Path, tensors: Mapping[str, Pending], shard_bytes: int) -> None:
  shards: list[dict[str, Pending]] = [{}]
  size = 0
  for name, tensor in tensors.items():
    if shards[-1] and size + tensor.nbytes > shard_bytes:
      shards.append({})
      size = 0
    shards[-1][name] = tensor
    size += tensor.nbytes
  number = lambda i: SINGLE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
  for i, shard in enumerate(shards):
    write_file(folder / number(i), shard)
  if len(shards) > 1:
    weight_map = {name: number(i) for i, shard in enumerate(shards) for name in shard}
    total = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
    index = {"metadata": total, "weight_map": weight_map}
    disk.write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


def _copy_files(loaded: Loaded | None, folder: pathlib.Path) -> None:
  """Copies the files around the weights of a checkpoint, which what was made of it has, too, or a run's own tokenizer.

  A run on bytes has no file of a tokenizer, and gets one.
  """
  if loaded is None:
    return
  if loaded.tokenizer and loaded.tokenizer.fingerprint == "bytes":
    disk.write_whole(folder / "tokenizer.json", bytes_file())
  tokenizer = loaded.tokenizer
  copy_files(tokenizer.folder if tokenizer and tokenizer.ids else loaded.folder, folder)
