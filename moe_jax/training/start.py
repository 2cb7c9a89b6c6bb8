"""Starts a run from the parameters of another one, and writes a model as the folder of a run to start from."""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from moe_jax import disk
from moe_jax.cluster import processes
from moe_jax.config import Config
from moe_jax.data.model_ids import read_ids, tokenizer_file
from moe_jax.data.tokenizers import Tokenizer, load_tokenizer
from moe_jax.errors import InputError
from moe_jax.nn.transformer import Transformer
from moe_jax.training.checkpoint import Checkpoints
from moe_jax.training.compiled import CompiledSteps, make_init, make_init_from, objective_of, resolve_config
from moe_jax.training.identity import start_folder
from moe_jax.training.load import CHECKPOINTS, CONFIG_FILE, restore_run, unfinished
from moe_jax.training.made import MADE_OF, ONLY_MODEL, is_made, new_model
from moe_jax.training.selection import Path, dotted
from moe_jax.training.step import TrainState
from moe_jax.training.tokenizer import write_tokenizer


def save_model(
  folder: str | os.PathLike[str],
  model: Transformer,
  config: Config,
  tokenizer: Tokenizer | None = None,
  domains: Sequence[str] = ("all",),
  source: Mapping[str, Any] | None = None,
) -> pathlib.Path:
  """Writes a model as the folder of a run without steps, which `load_run` and `--init_from` read.

  There is no optimizer state in it: its config.json says `trained: none`. The folder gets its name when it is whole. One whose
  config.json is damaged is moved to `damaged/` beside it. Where another command has made it of the same `source` in the meantime,
  that one is kept.

  Args:
    folder: new, or empty.
    model: with its parameters and balancer states. Its own configuration is the one that is written.
    config: what is around the model.
    tokenizer: written if it was trained on the data set or came with a published model, as runs do. With the latter come
      the ids of that model, its chat template, and its other files.
    domains: of the text.
    source: what it was made of, as `moe_jax.training.made.source_of` says it; None: nothing that another call asks for.

  Returns:
    The folder.

  Raises:
    InputError: if the folder has a run or a model, the disk is full, or there are several processes.
  """
  folder = pathlib.Path(folder)
  if jax.process_count() > 1:  # `model` is on the devices of one
    raise InputError(f"{folder}: a model is written by one process, not by {jax.process_count()}; start one")
  config = resolve_config(
    dataclasses.replace(
      config,
      model=model.config,
      optimizer=dataclasses.replace(config.optimizer, trained="none"),
      train=dataclasses.replace(config.train, hooks="", init_from=""),
    )
  )
  vocab_size = model.embedding_VD.get_value().shape[0] - objective_of(config).num_extra_ids
  abstract = jax.eval_shape(make_init(config, vocab_size), 0)
  try:
    with new_model(folder) as new:
      params, variables = nnx.state(model, nnx.Param, ...)
      params = with_values(abstract.params, params, str(folder))
      variables = with_values(abstract.variables, variables, str(folder))
      state = make_init_from(config, vocab_size)(params, variables, config.train.seed)
      with contextlib.closing(Checkpoints(new / CHECKPOINTS)) as checkpoints:
        checkpoints.save(0, state, ONLY_MODEL)
      of_tokenizer = write_tokenizer(new, tokenizer)
      if source is not None:
        disk.write_json(new / MADE_OF, source)
      of_text = {"vocab_size": vocab_size, "domains": list(domains)}
      disk.write_json(new / CONFIG_FILE, config.to_dict() | of_text | of_tokenizer)
  except disk.Taken:
    if source is None or not is_made(folder, source):
      raise
  return folder


def start_from(
  steps: CompiledSteps, config: Config, mesh: jax.sharding.Mesh, tokenizer: Tokenizer | None = None
) -> TrainState:
  """Returns the state before the first step of a run, with the parameters and balancer states of `init_from`.

  The step is 0 and the optimizer is new. A balancer that the other run did not have begins anew.

  Args:
    steps: of the run.
    config: of the run.
    mesh: of the run.
    tokenizer: of the text of the run; None: its ids stand for no text.

  Raises:
    InputError: if `init_from` holds no run, another model or one of another tokenizer, or its balancers have states
      that the run has no place for.
  """
  seed, source = config.train.seed, start_folder(config)
  where = f"--init_from={source}"
  try:
    other, _, saved = restore_run(pathlib.Path(source), mesh)
  except InputError as error:
    raise InputError(f"{where}: {error}") from None
  if processes.is_first() and (line := unfinished(pathlib.Path(source))):
    disk.note(f"{where}: {line}")
  if tokenizer is not None:
    _check_tokenizer(pathlib.Path(source), tokenizer, where)
  params = with_values(steps.abstract_state.params, saved.params, where)
  variables = steps.abstract_state.variables
  if jax.tree.leaves(saved.variables):
    if _shapes(saved.variables) != _shapes(variables):
      raise InputError(
        f"{where}: its balancers {_balancers(other)} have states that those of this run, {_balancers(config)}, have no "
        "place for; choose the same balancers"
      )
    variables = with_values(variables, saved.variables, where)
  elif jax.tree.leaves(variables):  # there was nothing to keep; to compile the initialisers takes a while
    variables = steps.init(seed).variables
  return steps.init_from(params, variables, seed)


def _check_tokenizer(folder: pathlib.Path, tokenizer: Tokenizer, where: str) -> None:
  """Raises `InputError` if the folder has the tokenizer of its model, and it is not `tokenizer` with the same ids."""
  path, ids = tokenizer_file(folder), read_ids(folder)
  if path is None:
    return
  right = f"so the same ids stand for other text; choose --tokenizer={path}"
  # With the ids of a published model, files beside it count, too.
  own = load_tokenizer(str(path), ids) if ids else None
  fingerprint = own.fingerprint if own else hashlib.sha256(path.read_bytes()).hexdigest()
  if fingerprint != tokenizer.fingerprint:
    here = tokenizer.fingerprint[:12]
    raise InputError(
      f"{where}: its model has another tokenizer (fingerprint {fingerprint[:12]}, here {here}), {right}"
    )
  if own and (tokenizer.ids is None or tokenizer.bos_id != own.bos_id):
    raise InputError(
      f"{where}: its model has the ids of a published one, which this tokenizer lacks, {right}"
    )


def with_values(target: nnx.State, source: nnx.State, where: str) -> nnx.State:
  """Returns the variables of `target` with the values of `source`.

  Raises:
    InputError: if they do not have the same variables with the same shapes. It begins with `where`.
  """
  own, other = dict(nnx.to_flat_state(target)), dict(nnx.to_flat_state(source))
  different = sorted(
    (path for path in own | other if _shape(own.get(path)) != _shape(other.get(path))), key=dotted
  )
  if different:
    path: Path = different[0]
    raise InputError(
      f"{where}: holds another model ({len(different)} variables differ, such as {dotted(path)}: there "
      f"{_shape(other.get(path))}, here {_shape(own.get(path))}); its config.json has the flags of its model"
    )
  return nnx.from_flat_state(
    [(path, variable.replace(other[path].get_value())) for path, variable in own.items()]
  )


def _shape(variable: nnx.Variable | None) -> str:
  """Shapes and types of a variable, as text; a balancer's state is a tree."""
  if variable is None:
    return "none"
  return ", ".join(f"{x.dtype}{list(x.shape)}" for x in jax.tree.leaves(variable.get_value())) or "empty"


def _shapes(state: nnx.State) -> dict[Path, str]:
  return {path: _shape(variable) for path, variable in nnx.to_flat_state(state)}


def _balancers(config: Config) -> str:
  return " and ".join(sorted({"+".join(map(str, moe.balancers)) for moe in config.model.moe_configs}))
