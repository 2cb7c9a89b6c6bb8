"""The flags by which a script opens a model: `--model`, `--mesh`, `--plugins`."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from absl import flags

from moe_jax.config import MeshConfig
from moe_jax.errors import InputError, unknown_name

if TYPE_CHECKING:
  from moe_jax.training.load import Loaded


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
    if flags.FLAGS.mesh:
      mesh = sharding.make_mesh(mesh_config(flags.FLAGS.mesh))
      stack.enter_context(jax.set_mesh(mesh))
    loaded = load(flags.FLAGS.model, flags.FLAGS.dtype)
    if flags.FLAGS.mesh:
      parts = mesh.size  # the batch is made to fit, so only the model is checked
      sharding.check_divides(mesh, loaded.config.model, micro_batch=parts, num_groups=parts)
    yield loaded


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
