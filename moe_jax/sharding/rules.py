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
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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
