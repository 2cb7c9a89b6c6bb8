"""Loads a model: a published checkpoint in Hugging Face's form, or a run of this package."""

import contextlib
import dataclasses
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax import sharding
from moe_jax.config import Config, DataConfig, TrainConfig
from moe_jax.data.model_ids import ModelIds, tokenizer_file
from moe_jax.data.tokenizers import Tokenizer, load_tokenizer
from moe_jax.errors import InputError, unknown_name
from moe_jax.interop.families import FAMILIES, Family, Values
from moe_jax.interop.families.fields import layers_of
from moe_jax.interop.folder import CONFIG, Folder, open_folder, read_config
from moe_jax.interop.memory import check_memory, largest_layer
from moe_jax.interop.names import Stored, bias_index, module_at, stored_parameters
from moe_jax.interop.numbers import check_integer, read_numbers
from moe_jax.interop.place import load_parameter
from moe_jax.interop.quantised import quantisation
from moe_jax.nn.moe import MoE
from moe_jax.nn.transformer import Transformer
from moe_jax.nn.variables import BalancerState
from moe_jax.training.compiled import abstract_model, objective_of, resolve_config
from moe_jax.training.load import Loaded, config_of_run, load_run

DTYPES = ("float32", "bfloat16")
_MOST_LAYERS = 10_000  # of a config.json that is taken seriously


def load(folder: str | os.PathLike[str], dtype: str = "float32", mtp: bool = False) -> Loaded:
  """Loads the model in `folder`: a checkpoint in Hugging Face's form, or the newest checkpoint of a run.

  The parameters of a published checkpoint go straight to the mesh in use (`jax.set_mesh`), or to the process's first
  device if there is none. Every process reads only the parts of its devices.

  Args:
    folder: has config.json and safetensors files, or is the folder of a run.
    dtype: of the parameters of a published checkpoint, float32 or bfloat16; those of a run stay float32. The router, norms and biases are always
      float32. The model computes in bfloat16 if the checkpoint or the parameters are in it.
    mtp: whether to load the modules of multi-token prediction, too. The objective then trains them.

  Returns:
    A `Loaded`: model, config, tokenizer, and more.

  Raises:
    InputError: if the folder holds no model, bfloat16 is asked of a run, the architecture is unknown, a file is missing or torn, a tensor is
      missing, left over or of another shape than config.json says, the tokenizer has more ids than the model, the mesh
      does not divide the model, or memory is too small.
  """
  folder = pathlib.Path(folder).expanduser()
  if is_run(folder):
    if dtype != "float32":
      raise InputError(
        f"{folder}: dtype={dtype} is for published checkpoints; the parameters of a run are float32, and it computes in "
        "its --compute_dtype. moe_jax.save writes a checkpoint that can be loaded in bfloat16"
      )
    return load_run(folder)
  opened = open_checkpoint(folder, dtype, mtp)
  ids = opened.ids
  model, skipped = load_model(opened.family, opened.folder, opened.config, ids.vocab_size, dtype)
  return Loaded(model, opened.config, opened.tokenizer, 0, folder, ids.stop_ids, skipped, ids.max_positions)


class Opened(NamedTuple):
  """A published checkpoint of which only headers have been read."""

  family: Family
  folder: Folder
  config: Config  # resolved
  ids: ModelIds
  tokenizer: Tokenizer | None


def is_run(folder: pathlib.Path) -> bool:
  """Returns whether the folder is that of a run. Raises `InputError` if it has no config.json."""
  values = read_config(folder / CONFIG)
  return "model_type" not in values and "architectures" not in values


def open_checkpoint(folder: pathlib.Path, dtype: str, mtp: bool) -> Opened:
  """Opens a published checkpoint. See `load` for the arguments, and for the errors."""
  if dtype not in DTYPES:
    raise InputError(f"load: dtype must be {' or '.join(DTYPES)}, got {dtype!r}")
  plain = read_config(folder / CONFIG)
  family, values = family_of(folder, plain), Values(str(folder / CONFIG), plain)
  file, ids = tokenizer_file(folder), read_numbers(folder, values)
  tokenizer = None if file is None else load_tokenizer(str(file), ids)
  config = _config(family, values, DataConfig(tokenizer=str(file or "bytes")), dtype, mtp)
  return Opened(family, open_folder(folder, plain), config, ids, tokenizer)


def read_model_config(folder: str | os.PathLike[str]) -> tuple[Config, int]:
  """Returns the configuration of a published checkpoint or of a run, and its V, from config.json alone, with all modules.

  Raises:
    InputError: if there is no config.json of a known architecture, or of a run of this version.
  """
  path = pathlib.Path(folder).expanduser()
  read = read_config(path / CONFIG)
  if is_run(path):
    config, vocab_size = config_of_run(path)
    return config, vocab_size + objective_of(config).num_extra_ids
  family, values = family_of(path, read), Values(str(path / CONFIG), read)
  with _naming_file(values):
    mtp = family.mtp_depth(values) > 0
  quantisation(path, read)
  config = _config(family, values, DataConfig(), "float32", mtp)
  return config, read_numbers(path, values).vocab_size


def family_of(folder: pathlib.Path, values: dict[str, Any]) -> Family:
  """Returns the family by `model_type`, or by `architectures` where that is missing."""
  architectures = values.get("architectures") or []
  architectures = architectures if isinstance(architectures, list) else [architectures]
  name = values.get("model_type")
  for family in FAMILIES.values():
    if name in (family.model_type, *family.other_types):
      return family
    if name is None and family.architecture in architectures:
      return family
  if name is not None:
    error = unknown_name("model_type", str(name), FAMILIES)
  else:
    known = {family.architecture for family in FAMILIES.values()}
    error = unknown_name("architectures", ", ".join(map(str, architectures)), known)
  raise InputError(f"{folder / CONFIG}: {error}")


def _config(family: Family, values: Values, data: DataConfig, dtype: str, mtp: bool) -> Config:
  """The configuration of the checkpoint. Everything around the model has its defaults."""
  with _naming_file(values):
    check_integer(values, "num_hidden_layers", 1, _MOST_LAYERS)
    model = family.read(values)
    depth = family.mtp_depth(values)
  if dtype == "bfloat16":
    model = dataclasses.replace(model, compute_dtype=dtype)
  train = TrainConfig()
  if mtp:
    train = dataclasses.replace(train, objective="next_tokens")
    model = dataclasses.replace(model, mtp_depth=depth)
    if not model.mtp_depth:
      raise InputError(f"{values.where}: has no module of multi-token prediction; use mtp=False")
  with _naming_file(values):
    try:
      return resolve_config(Config(model=model, data=data, train=train))
    except InputError as error:
      raise InputError(f"{values.where}: {error}") from None


@contextlib.contextmanager
def _naming_file(values: Values) -> Iterator[None]:
  """Makes one line of what a value of a wrong type leads to."""
  try:
    yield
  except InputError:
    raise
  except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
    text = " ".join(repr(error).split())[:200]
    raise InputError(f"{values.where}: a value is missing or has a wrong type ({text})") from None


def load_model(
  family: Family, folder: Folder, config: Config, vocab_size: int, dtype: str
) -> tuple[Transformer, tuple[str, ...]]:
  """Returns the model of a resolved configuration with the values of a checkpoint, and the tensors that were skipped.

  Raises:
    InputError: see `load`.
  """
  abstract = abstract_model(config, vocab_size)
  found = list(stored_parameters(abstract, family, folder.tensors))
  skipped = check_tensors(folder, found, not_loaded(family, folder, config))
  graphdef, state = nnx.split(abstract)
  mesh = mesh_in_use()
  sharding.check_divides(mesh, config.model, micro_batch=mesh.size, num_groups=mesh.size)
  layouts = {
    path: leaf.get_value() for path, leaf in nnx.to_flat_state(sharding.state_shardings(mesh, state))
  }
  variables = dict(nnx.to_flat_state(state))
  types = {path: dtype_of(path, variable, dtype) for path, variable in variables.items()}
  _check_memory(folder, found, layouts, types, mesh, dtype)
  values = initial_balancers(abstract, mesh)
  for stored in found:
    if isinstance(variables[stored.path], BalancerState):
      array = load_parameter(stored, folder.tensors, np.dtype(np.float32), sharding.replicated(mesh))
      values[stored.path] = with_bias(abstract, stored, values[stored.path], array)
    else:
      layout = layouts[stored.path]
      values[stored.path] = load_parameter(stored, folder.tensors, types[stored.path], layout)
  filled = [(path, variable.replace(values[path])) for path, variable in variables.items()]
  return nnx.merge(graphdef, nnx.from_flat_state(filled)), skipped


def not_loaded(family: Family, folder: Folder, config: Config) -> re.Pattern[str]:
  """Matches the names of tensors that the model has no part for, and of copies."""
  first = len(layers_of(config.model))
  depth = family.mtp_depth(Values(str(folder.path / CONFIG), folder.config))
  modules = [rf"model\.layers\.{first + i}\..*" for i in range(config.model.mtp_depth, depth)]
  copies = [re.escape(name) for name in family.copies(config.model)]
  return re.compile("|".join([*modules, *copies, *filter(None, [family.skipped])]) or r"(?!)")


def mesh_in_use() -> jax.sharding.Mesh:
  """Returns the mesh of `jax.set_mesh`, or a mesh of one device."""
  mesh = jax.sharding.get_mesh()
  return jax.sharding.Mesh([[[[[jax.local_devices()[0]]]]]], sharding.MESH_AXES) if mesh.empty else mesh


def check_tensors(folder: Folder, found: list[Stored], allowed: re.Pattern[str]) -> tuple[str, ...]:
  """Returns the tensors that are skipped.

  Raises:
    InputError: unless every other tensor of the checkpoint is used, and every parameter is there with its shape and
      as floating point.
  """
  used, missing = set(), []
  for stored in found:
    for piece in stored.pieces:
      used.add(piece.name)
      if piece.name not in folder.tensors:
        missing.append(piece.name)
        continue
      right = piece.layout.file_shape(stored.shape[len(piece.lead) :])
      shape = tuple(folder.tensors[piece.name].shape)
      if shape != right:
        raise InputError(
          f"{folder.path}: {piece.name} has shape {list(shape)}, and {CONFIG} gives it {list(right)}; use files of one "
          "checkpoint"
        )
      kind = np.dtype(folder.tensors[piece.name].dtype)
      if kind.kind in "iub":
        raise InputError(
          f"{folder.path}: {piece.name} has type {kind}, and parameters are floating point; of quantised checkpoints those "
          "in fp8 or mxfp4 are read"
        )
  left_over = folder.tensors.keys() - used
  skipped = {name for name in left_over if allowed.fullmatch(name)}
  texts = []
  for what, names in (("lacks", set(missing)), ("has no use here for", left_over - skipped)):
    if names:
      texts.append(f"{what} {len(names)} tensors, such as {', '.join(sorted(names)[:3])}")
  if texts:
    raise InputError(f"{folder.path}: the checkpoint {', and '.join(texts)}")
  return tuple(sorted(skipped))


def dtype_of(path: tuple, variable: nnx.Variable, dtype: str) -> np.dtype:
  """The type of a variable: `dtype` for the embedding and for matrices, except the router's, and otherwise float32."""
  is_matrix = "num_in" in variable.get_metadata() or path == ("embedding_VD",)
  return np.dtype(jnp.dtype(dtype if is_matrix and "router" not in path else "float32"))


def _check_memory(
  folder: Folder, found: list[Stored], layouts: dict, types: dict, mesh: jax.sharding.Mesh, dtype: str
) -> None:
  needed = dict.fromkeys(mesh.local_devices, 0)
  for stored in found:
    layout = layouts[stored.path]
    if isinstance(layout, jax.sharding.Sharding):
      size = int(np.prod(layout.shard_shape(stored.shape))) * types[stored.path].itemsize
      needed = {device: before + size for device, before in needed.items()}
  layer = largest_layer(found, types)
  check_memory(f"{folder.path}: the model", needed, dtype, layer=layer)


def initial_balancers(model: Transformer, mesh: jax.sharding.Mesh) -> dict[tuple, Any]:
  """Returns the states of all balancers before the first step, stacked as the model has them."""
  states = {}
  for path, layer in nnx.iter_modules(model):
    if isinstance(layer, MoE):
      like = layer.balancer_state.get_value()
      fill = lambda leaf, like: jnp.broadcast_to(leaf, like.shape).astype(like.dtype)
      state = jax.tree.map(fill, layer.balancer.init(layer.num_scored_experts), like)
      states[(*path, "balancer_state")] = jax.device_put(state, sharding.replicated(mesh))
  return states


def with_bias(model: Transformer, stored: Stored, state: Any, bias: jax.Array) -> Any:
  """Returns a balancer's state with `bias` in its place."""
  leaves, tree = jax.tree.flatten(state)
  leaves[bias_index(module_at(model, stored.path[:-1]))] = bias
  return jax.tree.unflatten(tree, leaves)
