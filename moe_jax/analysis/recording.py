"""The run whose router logits a study reads: trained and recorded once in its folder, and kept."""

import dataclasses
import pathlib
from typing import Any

from moe_jax import sharding
from moe_jax.cluster import processes
from moe_jax.config import Config, MoEConfig, spec_text
from moe_jax.config.plain import from_fields
from moe_jax.data import load_dataset
from moe_jax.errors import InputError
from moe_jax.nn.build import num_routed_layers, resolve_moe, routed_layer
from moe_jax.training.compiled import check_run
from moe_jax.training.identity import check_same_run, is_shorter
from moe_jax.training.loop import Run
from moe_jax.training.progress import TrainingProgress
from moe_jax.training.result_file import RESULT_FILE, read_result
from moe_jax.training.router_trace import FOLDER, Trace


def with_recording(config: Config, num_steps: int) -> Config:
  """`config` for a run of `num_steps` that records every step, checked.

  Raises:
    InputError: a wrong field, or a layer without a router.
  """
  train = dataclasses.replace(
    config.train,
    num_steps=num_steps,
    record_router_logits=1,
    eval_batches=1,  # no study reads the validation
    checkpoint_every=config.train.checkpoint_every or 100,
  )
  config = dataclasses.replace(config, train=train).check()
  return check_run(config, sharding.make_mesh(config.mesh))


def trace_shape(config: Config) -> tuple[int, int, int, int]:
  """(R, B, L, E) of each step that a run of the resolved `config` records."""
  data, model = config.data, config.model
  num_scored = routed_layer(model.moe).num_scored_experts
  return num_routed_layers(model), data.batch_size, data.sequence_length, num_scored


def recorded_config(trace: Trace) -> MoEConfig:
  """The layer's configuration of the recorded run.

  Raises:
    InputError: the trace is of a version with other fields, or its layers differ.
  """
  try:
    if trace.header["moe"] is not None:
      return from_fields(MoEConfig, trace.header["moe"])
  except (KeyError, TypeError, InputError) as error:
    raise InputError(f"{trace.folder}: its configuration is not one of this version ({error})") from None
  raise InputError(f"{trace.folder}: its layers have no configuration in common, and a replay has one")


def has_bias(moe: MoEConfig) -> bool:
  """Whether the balancers of the layer move its choices by a bias, which recorded logits do not have."""
  layer = routed_layer(resolve_moe(moe))
  return layer.balancer.bias(layer.balancer.init(layer.num_scored_experts)) is not None


def run_folder(trace: Trace) -> pathlib.Path:
  """Returns the folder of the run that recorded the trace, or that of a trace by itself."""
  return trace.folder.parent if trace.folder.name == FOLDER else trace.folder


def record(config: Config, folder: pathlib.Path, console: Any, show: str = "the recorded run") -> Trace:
  """Trains and records in `folder`, unless that is done; a run that was stopped is continued.

  Args:
    config: as from `with_recording`.
    folder: of the run, new or holding the same run.
    console: a rich Console.
    show: what the progress bar calls the run.

  Raises:
    InputError: the folder holds a run of another configuration, on other text, or with other code of a method.
  """
  dataset = load_dataset(config.data)
  check_same_run(folder, config, dataset.info.fingerprint)
  if processes.from_first(bool(read_result(folder / RESULT_FILE)) and not is_shorter(folder, config)):
    console.print(f"the run in {folder} is done and kept", soft_wrap=True)
  else:
    label = spec_text(config.model.moe.balancers)
    with TrainingProgress(config.train.num_steps, console) as progress:
      Run(config, dataset, folder, progress, label=label, show=show).train()
    processes.wait_for_all("recorded")
  return Trace(folder)
