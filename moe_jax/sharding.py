"""Logical axes -> mesh axes. The only file that spells mesh axes.

Parameters and activations name their logical axes; `RULES` says where each goes, and `scripts/sharding_table.py`
prints what that makes of every tensor. The mesh has automatic axis types: maths files stay free of shardings and
XLA's partitioner inserts collectives (docs/adr/0002).
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from moe_jax.config import MeshConfig, ModelConfig
from moe_jax.errors import InputError

# The mesh axes, from the slowest links to the fastest. All but `tensor` split the batch:
#   slice   across slices of a pod, or nodes: only gradients cross it
#   data    replicas of the parameters
#   fsdp    parameters and optimizer state are kept in parts, and gathered layer by layer where they are used
#   expert  each device holds some of the experts; tokens travel to them and back
#   tensor  heads, the experts' and dense hidden dimensions, the vocabulary
MESH_AXES = ("slice", "data", "fsdp", "expert", "tensor")
BATCH_AXES = ("slice", "data", "fsdp", "expert")

# Logical axes that are not named here are whole on every device.
RULES: dict[str, tuple[str, ...]] = {
  "batch": BATCH_AXES,  # sequences
  "group": BATCH_AXES,  # routing groups: parts of sequences, in the same order
  "expert": ("expert",),
  "embed": ("fsdp",),  # of parameters, where they are kept; see `gathered`
  "mlp": ("tensor",),
  "heads": ("tensor",),
  "kv_heads": ("tensor",),
  "vocab": ("tensor",),
}
# Whole where the mesh does not divide them: a vocabulary is what it is, and key-value heads are few. Anything
# else that does not divide is refused by `check_divides`.
WHERE_IT_FITS = ("kv_heads", "vocab")
KEPT_IN_PARTS = ("embed",)  # split where a parameter is kept, whole where it is used


def partition_spec(
  logical_axes: tuple[str | None, ...],
  shape: Sequence[int] | None = None,
  sizes: Mapping[str, int] | None = None,
) -> PartitionSpec:
  """Mesh axes for each logical axis; a mesh axis that an earlier dimension took is not used again.

  So ("group", "embed") is split over all axes of the batch, and ("expert", "group", ...) over expert by its first
  dimension and over the others by its second: going from one to the other is the all-to-all.

  Args:
    logical_axes: one per dimension; None is whole.
    shape, sizes: of the array and of the mesh; with them, axes in `WHERE_IT_FITS` are whole where they do not fit.
  """
  taken: set[str] = set()
  spec = []
  for i, name in enumerate(logical_axes):
    axes = tuple(a for a in RULES.get(name or "", ()) if a not in taken)
    if name in WHERE_IT_FITS and shape is not None and shape[i] % math.prod(sizes[a] for a in axes):
      axes = ()
    taken.update(axes)
    spec.append(axes[0] if len(axes) == 1 else axes or None)
  return PartitionSpec(*spec)


def constrain(x: jax.Array, logical_axes: tuple[str | None, ...]) -> jax.Array:
  """Asks XLA for the layout of `logical_axes` on the mesh in use (`jax.set_mesh`); without one, `x`."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  return jax.lax.with_sharding_constraint(x, partition_spec(logical_axes, x.shape, mesh.shape))


def in_use(logical_axes: tuple[str | None, ...]) -> tuple[str | None, ...]:
  """The logical axes of a parameter where it is multiplied: whole along what is only kept in parts."""
  return tuple(None if name in KEPT_IN_PARTS else name for name in logical_axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(w: jax.Array, logical_axes: tuple[str | None, ...]) -> jax.Array:
  return constrain(w, in_use(logical_axes))


# The rule of `constrain` would ask for the whole gradient on every device, and a scan over layers would stack those.
_gathered.defvjp(lambda w, axes: (_gathered(w, axes), None), lambda axes, _, d_w: (constrain(d_w, axes),))


def gathered(w: jax.Array, logical_axes: tuple[str | None, ...]) -> jax.Array:
  """A parameter, kept in parts over fsdp, whole for its use; its gradient comes back in parts.

  Cast it before: half the bytes travel. Inside a scan over layers, one layer's parameters are whole at a time.
  """
  sizes = jax.sharding.get_abstract_mesh().shape
  axes = [a for name in logical_axes if name in KEPT_IN_PARTS for a in RULES[name]]
  if math.prod(sizes.get(a, 1) for a in axes) == 1:
    return w
  return _gathered(w, tuple(logical_axes))


def on_one_cpu() -> bool:
  """Whether the program being traced runs on a single CPU device: there is no exchange to prepare."""
  mesh = jax.sharding.get_abstract_mesh()
  return jax.default_backend() == "cpu" and (mesh.empty or mesh.size == 1)


def compiler_options(platform: str) -> dict[str, str]:
  """What the steps are compiled with, beyond the compiler's defaults."""
  if platform != "tpu":
    return {}
  return {
    # Otherwise the partitioner turns gathers and the products behind them into rings of permutes: four times as long
    # to compile, and no collective is where the rules say it is.
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
    # Otherwise the layers' stacked parameters are cast in front of the loop, and a second copy of all is kept.
    "xla_jf_bf16_propagation": "false",
  }


def axis_sizes(config: MeshConfig, num_devices: int, fewer: bool = False) -> dict[str, int]:
  """Devices along each mesh axis, -1 filled in. `fewer`: a mesh may leave devices out.

  Raises:
    InputError: an axis is 0 or less than -1, or the axes do not multiply to the number of devices.
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
  """The mesh of `config` over `devices`: all of all processes, or those of a topology that is only compiled for.

  Without `devices`, a single process may ask for fewer than it has and gets the first ones. Where the devices say
  which slice they are in, `slice` goes over slices and every other axis stays inside one.

  Raises:
    InputError: the axes do not multiply to the number of devices, or `slice` not to the number of slices.
  """
  fewer = devices is None and jax.process_count() == 1
  devices = list(jax.devices() if devices is None else devices)
  sizes = axis_sizes(config, len(devices), fewer)
  devices = devices[: math.prod(sizes.values())]
  shape, auto = tuple(sizes.values()), (AxisType.Auto,) * len(sizes)
  num_slices = len({getattr(device, "slice_index", 0) for device in devices})
  if num_slices == 1:
    # An axis may take a part of a torus dimension, so every mesh that multiplies to the devices can be laid.
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
  """Raises `InputError` where the mesh does not divide what it has to split.

  Args:
    mesh: with the axes `MESH_AXES`.
    model: its experts, heads, hidden widths and model dimension are split.
    micro_batch: sequences of each micro-batch.
    num_groups: routing groups of each micro-batch.
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
  split = [("num_experts", model.moe.num_experts, "expert"), ("model_dim", model.model_dim, "fsdp")]
  split += [("num_heads", model.num_heads, "tensor"), ("expert_dim", model.moe.expert_dim, "tensor")]
  if model.num_dense_first or model.moe_every > 1:
    split.append(("dense_dim", model.dense_dim, "tensor"))
  for field, value, axis in split:
    if value % mesh.shape[axis]:
      raise InputError(
        f"--{field}={value}: must be a multiple of --{axis}_parallelism={mesh.shape[axis]}, which splits it"
      )


def state_shardings(mesh: Mesh, state: Any) -> Any:
  """A tree like `state` with a NamedSharding for each array.

  Variables that name logical axes follow the rules, and so do an optimizer's moments, which keep their
  parameter's names. Stacked layers have one more axis in front. Everything else is replicated.
  """

  def of_leaf(leaf):
    if not isinstance(leaf, nnx.Variable):
      return replicated(mesh)
    axes = leaf.get_metadata().get("logical_axes")
    if axes is None:
      return leaf.replace(jax.tree.map(lambda _: replicated(mesh), leaf.get_value()))
    shape = leaf.get_value().shape
    axes = ("layers",) * (len(shape) - len(axes)) + axes
    return leaf.replace(NamedSharding(mesh, partition_spec(axes, shape, mesh.shape)))

  return jax.tree.map(of_leaf, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Of arrays with a leading batch axis."""
  return NamedSharding(mesh, partition_spec(("batch",)))
