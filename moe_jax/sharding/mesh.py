"""The mesh: its size along each axis, the placement of devices, and the sizes of a model that it must divide."""

import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from moe_jax.config import MeshConfig, ModelConfig, spec_text
from moe_jax.errors import InputError
from moe_jax.sharding.rules import BATCH_AXES, MESH_AXES


def compiler_options(platform: str) -> dict[str, str]:
  """Returns the compiler options for the steps that differ from the compiler's defaults."""
  if platform != "tpu":
    return {}
  return {
    # By default, the partitioner turns gathers and the products after them into rings of permutes. Compilation then
    # takes four times as long, and the collectives are not those that the rules describe.
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
    # By default, the layers' stacked parameters are cast before the loop, which keeps a second copy of them all.
    "xla_jf_bf16_propagation": "false",
  }


def axis_sizes(config: MeshConfig, num_devices: int, fewer: bool = False) -> dict[str, int]:
  """Returns the number of devices along each mesh axis, with -1 replaced. `fewer`: the mesh may use fewer devices.

  Raises:
    InputError: if an axis is 0 or less than -1, or the axes do not multiply to the number of devices.
  """
  config.check()
  sizes = {name: getattr(config, name) for name in MESH_AXES}
  known = math.prod(size for size in sizes.values() if size != -1)
  free = [name for name, size in sizes.items() if size == -1]
  shown = ", ".join(f"--{name}_parallelism={size}" for name, size in sizes.items() if size != 1)
  shown = shown or "--data_parallelism=1"
  if len(free) > 1:
    raise InputError(f"{shown}: at most one axis can be -1 (what is left)")
  if fewer and not free and known < num_devices:
    return sizes
  if num_devices % known or (not free and known != num_devices):
    raise InputError(f"{shown}: the axes must multiply to the {num_devices} devices here")
  return sizes | dict.fromkeys(free, num_devices // known)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Returns the mesh of `config` over `devices`. The default is all devices of all processes.

  `devices` may be those of a topology that is only compiled for. Without `devices`, a single process may ask for
  fewer devices than it has, and gets the first ones. If devices have a slice index, the axis `slice` goes over
  slices, and every other axis stays inside one slice.

  Raises:
    InputError: if the axes do not multiply to the number of devices, or `slice` is not the number of slices.
  """
  fewer = devices is None and jax.process_count() == 1
  devices = list(jax.devices() if devices is None else devices)
  sizes = axis_sizes(config, len(devices), fewer)
  devices = devices[: math.prod(sizes.values())]
  shape, auto = tuple(sizes.values()), (AxisType.Auto,) * len(sizes)
  num_slices = len({getattr(device, "slice_index", 0) for device in devices})
  if num_slices == 1:
    # An axis may use part of a torus dimension, so every mesh with the right number of devices can be placed.
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=auto)
  if sizes["slice"] != num_slices:
    raise InputError(f"--slice_parallelism={sizes['slice']}: the devices here are in {num_slices} slices")
  outer = (num_slices, *(1 for _ in shape[1:]))
  grid = mesh_utils.create_hybrid_device_mesh((1, *shape[1:]), outer, devices, allow_split_physical_axes=True)
  return Mesh(grid, MESH_AXES, axis_types=auto)


def check_divides(
  mesh: Mesh | AbstractMesh, model: ModelConfig, *, micro_batch: int, num_groups: int
) -> None:
  """Raises `InputError` if the mesh does not divide a size that it splits.

  Args:
    mesh: has the axes `MESH_AXES`.
    model: its experts, heads, hidden widths and model dimension are split.
    micro_batch: the number of sequences in each micro-batch.
    num_groups: the number of routing groups in each micro-batch.
  """
  parts = math.prod(mesh.shape[name] for name in BATCH_AXES)
  given = " x ".join(f"{name}={mesh.shape[name]}" for name in BATCH_AXES if mesh.shape[name] > 1)
  if micro_batch % parts:
    raise InputError(
      f"--batch_size: each of the step's micro-batches has {micro_batch} sequences, which the {parts} devices "
      f"that the mesh splits it over ({given}) do not divide; use a multiple of {parts} (times --accumulation)"
    )
  if num_groups % parts:
    raise InputError(
      f"--group_size: gives {num_groups} routing groups per micro-batch, which the {parts} devices that the mesh "
      f"splits them over ({given}) do not divide; use a smaller group or a larger batch"
    )
  split = [("model_dim", model.model_dim, "fsdp"), ("num_heads", model.num_heads, "tensor")]
  for moe in model.moe_configs:
    split += [("num_experts", moe.num_experts, "expert"), ("expert_dim", moe.expert_dim, "tensor")]
    split += [("shared_expert_dim", moe.shared_expert_dim, "tensor")]
  kinds = {spec_text(block.ffn).partition(":")[0] for segment in model.blocks for block in segment.pattern}
  if kinds & {"mlp", "parallel_moe", "low_rank"}:
    split.append(("dense_dim", model.dense_dim, "tensor"))
  for field, value, axis in split:
    if value % mesh.shape[axis]:
      raise InputError(
        f"--{field}={value}: must be a multiple of --{axis}_parallelism={mesh.shape[axis]}, which splits it"
      )
