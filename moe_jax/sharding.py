"""Logical axes -> mesh axes. The only file that spells mesh axes.

Parameters and activations name their logical axes; the rules below say where each goes. The mesh has
automatic axis types: maths files stay free of shardings and XLA's partitioner inserts collectives
(docs/adr/0002).
"""

import math
from typing import Any

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe_jax.config import MeshConfig
from moe_jax.errors import InputError

# The batch is split over all devices; the `expert` axis splits experts inside a layer. Logical axes that
# are not named here are replicated.
RULES: dict[str, tuple[str, ...]] = {
  "batch": ("data", "expert"),
  "group": ("data", "expert"),
  "expert": ("expert",),
}


def partition_spec(logical_axes: tuple[str | None, ...]) -> PartitionSpec:
  """Mesh axes for each logical axis; a mesh axis that an earlier dimension took is not used again.

  So ("group", "embed") is split over data and expert, and ("expert", "group", ...) over expert by
  its first dimension and over data by its second: going from one to the other is the all-to-all.
  """
  taken: set[str] = set()
  spec = []
  for name in logical_axes:
    axes = tuple(a for a in RULES.get(name or "", ()) if a not in taken)
    taken.update(axes)
    spec.append(axes[0] if len(axes) == 1 else axes or None)
  return PartitionSpec(*spec)


def constrain(x: jax.Array, logical_axes: tuple[str | None, ...]) -> jax.Array:
  """Asks XLA for the layout of `logical_axes` on the mesh in use (`jax.set_mesh`); without one, `x`."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, partition_spec(logical_axes))


def on_one_cpu() -> bool:
  """Whether the program being traced runs on a single CPU device: there is no exchange to prepare."""
  mesh = jax.sharding.get_abstract_mesh()
  return jax.default_backend() == "cpu" and (mesh.empty or mesh.size == 1)


def make_mesh(config: MeshConfig) -> Mesh:
  """The mesh over all devices of all processes; a single process may ask for fewer and gets the first ones.

  Raises:
    InputError: the axes do not multiply to the number of devices.
  """
  num_devices = jax.device_count()
  sizes = {"data": config.data, "expert": config.expert}
  known = math.prod(size for size in sizes.values() if size != -1)
  free = [name for name, size in sizes.items() if size == -1]
  shown = ", ".join(f"--{name}_parallelism={size}" for name, size in sizes.items())
  if len(free) > 1:
    raise InputError(f"{shown}: at most one axis can be -1 (what is left)")
  fewer = not free and known < num_devices and jax.process_count() == 1
  if not fewer and (num_devices % known or (not free and known != num_devices)):
    raise InputError(f"{shown}: the axes must multiply to the {num_devices} devices here")
  for name in free:
    sizes[name] = num_devices // known
  devices = jax.devices()[: math.prod(sizes.values())]
  auto = (AxisType.Auto,) * len(sizes)
  return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=auto, devices=devices)


def check_divides(mesh: Mesh, *, micro_batch: int, num_experts: int, num_groups: int) -> None:
  """Raises `InputError` where the mesh does not divide what it has to split."""
  devices = mesh.size
  if micro_batch % devices:
    raise InputError(
      f"--batch_size: each of the step's micro-batches has {micro_batch} sequences, which the mesh's "
      f"{devices} devices do not divide; use a multiple of {devices} (times --accumulation)"
    )
  if num_experts % mesh.shape["expert"]:
    raise InputError(
      f"--num_experts={num_experts}: must be a multiple of --expert_parallelism={mesh.shape['expert']}"
    )
  if num_groups % devices:
    raise InputError(
      f"--group_size: gives {num_groups} routing groups per micro-batch, which the mesh's {devices} "
      "devices do not divide; use a smaller group or a larger batch"
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
    axes = ("layers",) * (leaf.get_value().ndim - len(axes)) + axes
    return leaf.replace(NamedSharding(mesh, partition_spec(axes)))

  return jax.tree.map(of_leaf, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Of arrays with a leading batch axis."""
  return NamedSharding(mesh, partition_spec(("batch",)))
