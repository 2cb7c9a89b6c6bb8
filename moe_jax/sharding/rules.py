"""Maps logical axes to mesh axes. This is the only file that names mesh axes.

Parameters and activations name their logical axes. `RULES` maps each to mesh axes, and `scripts/sharding_table.py`
prints the resulting sharding of every tensor. The mesh has automatic axis types, so the mathematical code contains
no shardings, and XLA's partitioner inserts the collectives (docs/adr/0002).
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# The mesh axes, from the slowest links to the fastest. All but `tensor` split the batch:
#   slice   slices of a pod, or nodes: only gradients are communicated across it
#   data    replicas of the parameters
#   fsdp    parameters and optimizer state are sharded, and gathered layer by layer where they are used
#   expert  each device holds some of the experts; tokens are sent there and back. With fsdp, also shards the parameters
#           that are not of experts
#   tensor  heads, the experts' and dense hidden dimensions, the vocabulary
MESH_AXES = ("slice", "data", "fsdp", "expert", "tensor")
BATCH_AXES = ("slice", "data", "fsdp", "expert")

# Logical axes that are not listed here are not split.
RULES: dict[str, tuple[str, ...]] = {
  "batch": BATCH_AXES,  # sequences
  "group": BATCH_AXES,  # routing groups: parts of sequences, in the same order
  "expert": ("expert",),
  "embed": ("fsdp", "expert"),  # of parameters, as they are stored; see `gathered`
  "attention_rank": ("fsdp", "expert"),  # the same, of what latent attention projects heads from
  "embed_block": ("fsdp", "expert"),  # rows or columns of a quantised matrix that share a byte or a scale
  "mlp": ("tensor",),
  "mlp_block": ("tensor",),
  "heads": ("tensor",),
  "kv_heads": ("tensor",),
  "vocab": ("tensor",),
}
# These are not split if the mesh does not divide them: the size of a vocabulary is given, and key-value heads, ranks and
# numbers of blocks are small. `check_divides` rejects any other size that the mesh does not divide, but for "embed" it asks
# only fsdp to divide it.
WHERE_IT_FITS = ("kv_heads", "vocab", "attention_rank", "embed_block", "mlp_block")
# Split where a parameter is stored, whole where it is used. `expert` takes part if `fsdp` does, so that a mesh without
# `fsdp` gathers nothing, and if both divide the size.
KEPT_IN_PARTS = ("embed", "attention_rank", "embed_block")


def partition_spec(
  logical_axes: tuple[str | None, ...],
  shape: Sequence[int] | None = None,
  sizes: Mapping[str, int] | None = None,
) -> PartitionSpec:
  """Returns the mesh axes of each logical axis. A mesh axis that an earlier dimension uses is not used again.

  For example, the first dimension of ("group", "embed") is split over all batch axes. ("expert", "group", ...) is
  split over expert in its first dimension and over the other batch axes in its second. Changing from one to the
  other is the all-to-all.

  Args:
    logical_axes: one per dimension; None is not split.
    shape: the shape of the array. With it, axes in `WHERE_IT_FITS` are not split if the mesh does not divide them, and
      those in `KEPT_IN_PARTS` are split over `expert`, too, if it does.
    sizes: the sizes of the mesh axes, needed with `shape`.
  """
  taken: set[str] = set()
  spec = []
  for i, name in enumerate(logical_axes):
    axes = tuple(a for a in RULES.get(name or "", ()) if a not in taken)
    if name in KEPT_IN_PARTS and not _all_split(axes, shape and shape[i], sizes):
      axes = axes[:1]
    if name in WHERE_IT_FITS and shape is not None and shape[i] % math.prod(sizes[a] for a in axes):
      axes = ()
    taken.update(axes)
    spec.append(axes[0] if len(axes) == 1 else axes or None)
  return PartitionSpec(*spec)


def _all_split(axes: Sequence[str], size: int | None, sizes: Mapping[str, int] | None) -> bool:
  """Whether a mesh of these sizes, if they are known, has all of these axes and they divide `size`."""
  if size is None or sizes is None:
    return False
  parts = [sizes.get(axis, 1) for axis in axes]
  return min(parts, default=1) > 1 and size % math.prod(parts) == 0


def constrain(x: jax.Array, logical_axes: tuple[str | None, ...]) -> jax.Array:
  """Constrains `x` to the layout of `logical_axes` on the mesh in use (`jax.set_mesh`). Without a mesh, returns `x`."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  return jax.lax.with_sharding_constraint(x, partition_spec(logical_axes, x.shape, mesh.shape))


def in_use(logical_axes: tuple[str | None, ...]) -> tuple[str | None, ...]:
  """Returns the logical axes of a parameter where it is used: not split along axes that are split only for storage."""
  return tuple(None if name in KEPT_IN_PARTS else name for name in logical_axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(w: jax.Array, logical_axes: tuple[str | None, ...]) -> jax.Array:
  return constrain(w, in_use(logical_axes))


# The derivative of `constrain` would put the whole gradient on every device, and a scan over layers would stack these.
_gathered.defvjp(lambda w, axes: (_gathered(w, axes), None), lambda axes, _, d_w: (constrain(d_w, axes),))


def gathered(w: jax.Array, logical_axes: tuple[str | None, ...]) -> jax.Array:
  """Gathers a parameter that is kept in parts, for its use. Its gradient is sharded again.

  Cast the parameter first, so that half the bytes are sent. Inside a scan over layers, only one layer's parameters
  are gathered at a time.
  """
  sizes = jax.sharding.get_abstract_mesh().shape
  if not any(name in KEPT_IN_PARTS and sizes.get(RULES[name][0], 1) > 1 for name in logical_axes):
    return w
  return _gathered(w, tuple(logical_axes))


def num_parts(logical_axis: str, sizes: Mapping[str, int]) -> int:
  """Returns the number of parts that a logical axis is split into, on a mesh with axes of these sizes."""
  return math.prod(sizes[axis] for axis in RULES.get(logical_axis, ()))


def platform() -> str:
  """Returns the platform that the program being traced is for: that of the mesh in use, or of the default device.

  It is not `jax.default_backend()` where a program is compiled for devices that are not present.
  """
  mesh = jax.sharding.get_abstract_mesh()
  device = None if mesh.empty else mesh.abstract_device
  device = device or jax.config.jax_default_device
  return getattr(device, "platform", device) or jax.default_backend()


def on_one_cpu() -> bool:
  """Returns whether the program being traced runs on a single CPU device, where there is no exchange to prepare."""
  mesh = jax.sharding.get_abstract_mesh()
  return platform() == "cpu" and (mesh.empty or mesh.size == 1)


def state_shardings(mesh: Mesh, state: Any) -> Any:
  """Returns a tree like `state` with a NamedSharding for each array.

  Variables that name logical axes follow the rules. So do an optimizer's moments, because they keep the names of
  their parameter. Stacked layers have one more axis in front. Everything else is replicated.
  """

  def of_leaf(leaf):
    if not isinstance(leaf, nnx.Variable):
      return replicated(mesh)
    axes, value = leaf.get_metadata().get("logical_axes"), leaf.get_value()
    if axes is None or not hasattr(value, "shape"):  # no array: what an optimizer keeps of a frozen parameter
      return leaf.replace(jax.tree.map(lambda _: replicated(mesh), value))
    shape = value.shape
    axes = ("layers",) * (len(shape) - len(axes)) + axes
    return leaf.replace(NamedSharding(mesh, partition_spec(axes, shape, mesh.shape)))

  return jax.tree.map(of_leaf, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays with a leading batch axis."""
  return NamedSharding(mesh, partition_spec(("batch",)))
