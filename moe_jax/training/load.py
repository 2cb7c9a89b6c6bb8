"""Loads a finished run: its model with the trained parameters, its configuration, and its tokenizer."""

import os
import pathlib
from typing import Any, NamedTuple

import jax
from flax import nnx

from moe_jax import disk, sharding
from moe_jax.cluster import processes
from moe_jax.config import Config
from moe_jax.data import Dataset, model_ids
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.errors import InputError
from moe_jax.nn.leaks import router_of_domain
from moe_jax.nn.transformer import Transformer
from moe_jax.training.changes import changes
from moe_jax.training.checkpoint import Checkpoints
from moe_jax.training.compiled import abstract_model, make_init, resolve_config
from moe_jax.training.result_file import RESULT_FILE, Result, read_result, steps_asked
from moe_jax.training.step import TrainState
from moe_jax.training.tokenizer import TOKENIZER_FILE, read_tokenizer

CONFIG_FILE, CHECKPOINTS = "config.json", "checkpoints"  # in the folder of a run
# What it holds of the text and the mesh, beside the configuration.
NOT_CONFIG = (
  "vocab_size",
  "domains",
  "fingerprint",
  "slots",
  "own_code",
  "own_metrics",
  "teacher",
  model_ids.KEY,
)


class Loaded(NamedTuple):
  """A model that was loaded from a run or a published checkpoint, and what belongs to it."""

  model: Transformer  # with its parameters and balancer states
  config: Config
  tokenizer: Tokenizer | None  # None: the folder of a published checkpoint has none
  step: int  # of the checkpoint of a run, otherwise 0
  folder: pathlib.Path  # what was loaded
  stop_ids: tuple[int, ...] = ()  # the tokens that end a text
  skipped: tuple[str, ...] = ()  # tensors of the checkpoint that the model has no part for
  max_positions: int = 0  # of a text that the model was made for; 0: not known
  domains: tuple[
    str, ...
  ] = ()  # of the text that the model was trained on, in the order of their numbers; (): not known

  def as_trained(self, dataset: Dataset) -> Dataset:
    """Returns the text with the domains numbered as in training, if a router reads them; otherwise as it is.

    Raises:
      InputError: if the text has domains that the text of training did not have.
    """
    router = router_of_domain(self.config.model) if self.domains else ""
    if not router or dataset.info.domains == self.domains:
      return dataset
    try:
      return dataset.with_domains(self.domains)
    except InputError as error:
      raise InputError(
        f"{error}: --router={router} of {self.folder} reads them; name them as in training"
      ) from None

  def __repr__(self) -> str:
    """One line instead of every array."""
    sizes = [leaf.size for leaf in jax.tree.leaves(nnx.state(self.model, nnx.Param))]
    step = f", step {self.step:,}" if self.step else ""
    return f"<Loaded {type(self.model).__name__} from {self.folder}{step}: {sum(sizes):,} parameters>"


def load_run(folder: str | os.PathLike[str]) -> Loaded:
  """Loads the newest checkpoint of the run in `folder`, on one device. One line says so if the run is not finished.

  Of several processes, each has the whole model on a device of its own. All must call it.

  Args:
    folder: the folder of a run. In the folder of a comparison, this is arms/ARM/seed_SEED.

  Raises:
    InputError: if the folder has no run or no checkpoint, if the checkpoint is of a run with another configuration than
      config.json has, if the run is finished and the checkpoint of its last step is not whole, if a method of the run is
      not registered, if another version of moe_jax wrote it, or if processes read different files.
  """
  folder = pathlib.Path(folder)
  mesh = jax.sharding.Mesh([[[[[jax.local_devices()[0]]]]]], sharding.MESH_AXES)
  config, vocab_size, state = restore_run(folder, mesh)
  if processes.is_first() and (state_of_run := unfinished(folder)):
    disk.note(state_of_run)
  model = abstract_model(config, vocab_size)
  # Values only: what was frozen in training is not frozen in the model.
  fill = lambda own, saved: own.replace(saved.get_value())
  params, variables = nnx.state(model, nnx.Param, ...)
  is_variable = lambda leaf: isinstance(leaf, nnx.Variable)
  filled = (
    jax.tree.map(fill, own, saved, is_leaf=is_variable)
    for own, saved in ((params, state.params), (variables, state.variables))
  )
  model = nnx.merge(nnx.graphdef(model), *filled)
  tokenizer, length = read_tokenizer(folder, config.data), config.data.sequence_length
  ids = tokenizer.ids
  stop_ids, positions = (ids.stop_ids, ids.max_positions or length) if ids else ((), length)
  found = {"max_positions": positions, "domains": _domains(folder, config)}
  return Loaded(model, config, tokenizer, int(state.step), folder, stop_ids, **found)


def restore_run(folder: pathlib.Path, mesh: jax.sharding.Mesh) -> tuple[Config, int, TrainState]:
  """Returns the resolved configuration of the run in `folder`, its V, and its newest checkpoint on `mesh`.

  Raises:
    InputError: see `load_run`.
  """
  config, vocab_size = config_of_run(folder)
  processes.check_agree(
    disk.digest_of_json(config.to_dict()),
    f"{folder}: digest of {CONFIG_FILE}",
    "all processes must read the same files",
  )
  abstract = jax.eval_shape(make_init(config, vocab_size), 0)
  checkpoints = Checkpoints(folder / CHECKPOINTS)
  try:
    if checkpoints.latest_step is None:
      raise InputError(f"{folder}: has no checkpoint yet")
    state, extra = checkpoints.restore(abstract, sharding.state_shardings(mesh, abstract))
  finally:
    checkpoints.close()
  if changed := _changes(extra.get("config"), config):
    raise InputError(
      f"{folder}: {CONFIG_FILE} is not that of the run which saved step {int(state.step)} ({'; '.join(changed[:3])}); bring "
      "back the file, or the checkpoints"
    )
  result = read_result(folder / RESULT_FILE)
  # One of fewer steps is left from before the run was extended, and the longer run is under way.
  if steps_asked(result) == config.train.num_steps:
    check_step(folder, result, int(state.step))
  return config, vocab_size, state


def config_of_run(folder: pathlib.Path) -> tuple[Config, int]:
  """Returns the resolved configuration of the run in `folder` and its V, from config.json alone.

  Raises:
    InputError: if there is no config.json of a run of this version, or a method of the run is not registered.
  """
  values = _read(folder / CONFIG_FILE)
  config = _config(folder, {name: value for name, value in values.items() if name not in NOT_CONFIG})
  return config, values["vocab_size"]


def _domains(folder: pathlib.Path, config: Config) -> tuple[str, ...]:
  """Returns the domains of the text of a run, or of a model that was saved without one if somebody said them."""
  domains = _read(folder / CONFIG_FILE).get("domains")
  if not isinstance(domains, list) or not all(isinstance(name, str) for name in domains):
    return ()
  is_default = config.optimizer.trained == "none" and domains == ["all"]
  return () if is_default else tuple(domains)


def _changes(saved: dict[str, Any] | None, config: Config) -> list[str]:
  """Returns how `config` differs from what a checkpoint says; None: a model that was saved without a run says nothing."""
  if saved is None:
    return []
  now = config.to_dict()
  now["data"] = saved["data"] | {
    "data_seed": now["data"]["data_seed"]
  }  # files of the text may be elsewhere now
  return changes(saved, now)


def unfinished(folder: pathlib.Path) -> str:
  """Returns a line if the newest checkpoint in `folder` is not the end of a finished run; empty if it is.

  A model that was saved without a run is finished.
  """
  steps = [int(p.name) for p in (folder / CHECKPOINTS).glob("*") if p.name.isdecimal()]
  step, result = max(steps, default=0), read_result(folder / RESULT_FILE)
  if "diverged" in result:
    return f"{folder}: diverged, and its newest checkpoint is of step {step}, before that"
  asked = steps_asked({"config": disk.read_object(folder / CONFIG_FILE) or {}})
  if step and steps_asked(result) != asked:
    return f"{folder}: is not finished (step {step} of {asked}); the command that trains it continues it"
  return ""


def check_finished(folder: pathlib.Path) -> None:
  """Raises `InputError` if the run in `folder` is not finished, or has diverged."""
  if line := unfinished(folder):
    raise InputError(line)


def check_step(folder: pathlib.Path, result: Result, step: int) -> None:
  """Raises `InputError` if the newest whole checkpoint in `folder` is not that of the step that `result` is of."""
  of_result = result.get("num_steps", step)  # one that diverged has none
  if step != of_result:
    raise InputError(
      f"{folder}: the result is of step {of_result}, and the newest whole checkpoint of step {step}; remove result.json: "
      f"then the same command of this run trains from step {step} on, and who reads the run gets that step"
    )


def tokenizer_name(loaded: Loaded) -> str:
  """Returns the name that loads the tokenizer of a run: a file of its folder, if that has one."""
  data, tokenizer = loaded.config.data, loaded.tokenizer
  if data.bpe_size:
    return str(loaded.folder / TOKENIZER_FILE)
  file = model_ids.tokenizer_file(loaded.folder) if tokenizer and tokenizer.ids else None
  return str(file or data.tokenizer)


def _read(path: pathlib.Path) -> dict[str, Any]:
  disk.check_not_file(path.parent)
  values = disk.read_object(path)
  if values is None:
    raise InputError(f"{path.parent}: holds no run ({path.name} is missing or not whole)")
  if "vocab_size" not in values:
    raise InputError(
      f"{path.parent}: is no folder of a run; in a comparison's folder, a run is arms/ARM/seed_SEED"
    )
  size = values["vocab_size"]
  if type(size) is not int or not 0 < size < 2**31:
    raise InputError(f"{path}: vocab_size={str(size)[:60]}: must be an integer from 1 to 2^31")
  return values


def _config(folder: pathlib.Path, values: dict[str, Any]) -> Config:
  if "model_type" in values or "architectures" in values:
    raise InputError(
      f"{folder}: is a published checkpoint, and this takes the folder of a run; moe_jax.training.start.save_model makes one of "
      "what moe_jax.load returns (docs/adapt.md)"
    )
  try:
    return resolve_config(Config.from_dict(values))
  except InputError as error:
    raise InputError(
      f"{folder}: {error}; register parts of your own before loading (moe_jax.register, or --plugins=FILE), and use the "
      "version of moe_jax that wrote the run"
    ) from None
  except (KeyError, TypeError) as error:
    raise InputError(f"{folder}: {CONFIG_FILE} is no configuration of this version ({error!r})") from None
