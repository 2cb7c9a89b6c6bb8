"""A copy of a tree of arrays in memory that two processes share: one fills it, and the other one writes it as a checkpoint."""

import mmap
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.training import digests
from moe_jax.training.orbax_writer import Unshared
from moe_jax.types import PyTree

_ALIGNED = 64  # bytes at which arrays begin: those of JAX may then be there without a copy


class SharedArrays:
  """Room for one copy of a tree of arrays: of whole arrays, or if there are several processes, of the shards of this one.

  Args:
    tree: arrays.

  Raises:
    OSError: if the system has no such memory.
    ValueError: if there are several processes, and an array is not JAX's, laid out on a mesh.
  """

  def __init__(self, tree: PyTree):
    leaves, self._structure = jax.tree.flatten(tree)
    parts = [_parts_of(leaf) for leaf in leaves]
    flat = [part for of_one in parts for part in of_one]
    starts = np.cumsum([0] + [-(-x.size * x.dtype.itemsize // _ALIGNED) * _ALIGNED for x in flat]).tolist()
    self.num_bytes = max(starts[-1], 1)
    meshes: list[Mesh] = []
    first = np.cumsum([0] + [len(of_one) for of_one in parts]).tolist()  # of the parts of each array
    arrays = [
      [x.dtype.name, list(x.shape), starts[begin:end], _layout_of(x, meshes)]
      for x, begin, end in zip(leaves, first, first[1:], strict=False)
    ]
    # As JSON: type, shape, first bytes and layout of each array; and the meshes, of which layouts name one.
    self.spec = {"arrays": arrays, "meshes": [_mesh_as_json(mesh) for mesh in meshes]}
    self.handle = os.memfd_create("checkpoint")
    try:
      os.ftruncate(self.handle, self.num_bytes)
      memory = mmap.mmap(self.handle, self.num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    except BaseException:
      os.close(self.handle)
      raise
    self.parts = [
      np.ndarray(x.shape, x.dtype, memory, start).view(Unshared)
      for x, start in zip(flat, starts, strict=False)
    ]
    tree = ocp.tree.serialize_tree(
      jax.tree.unflatten(self._structure, range(len(leaves))), keep_empty_nodes=True
    )
    # The tree as JSON: dicts, lists, and the number of each array in its place.
    self.numbered = jax.tree.map(_as_json, tree, is_leaf=_is_empty)

  def copy(self, tree: PyTree) -> list[np.ndarray | None]:
    """Copies what is in host memory already. Returns copies of all other arrays, which `fill` puts into their places."""
    parts = parts_of(tree)
    for part in parts:
      if not digests.in_host_memory(part):
        part.copy_to_host_async()
    rest: list[np.ndarray | None] = []
    for place, part in zip(self.parts, parts, strict=True):
      if digests.in_host_memory(part):
        np.copyto(place, part)
      rest.append(None if digests.in_host_memory(part) else np.asarray(part))
    return rest

  def fill(self, rest: list[np.ndarray | None]) -> None:
    """Takes over the copies that `copy` returned, one after the other, so that only one is in memory twice."""
    for index, place in enumerate(self.parts):
      if rest[index] is not None:
        np.copyto(place, rest[index])
        rest[index] = None

  def tree(self) -> PyTree:
    """The whole arrays of one process, as they are now."""
    return jax.tree.unflatten(self._structure, self.parts)

  def close(self) -> None:
    """Gives the memory back, when the last array is gone."""
    self.parts = []
    os.close(self.handle)


def parts_of(tree: PyTree) -> list[Any]:
  """Returns what is copied of a tree of arrays: these, or if there are several processes, the shards of this one."""
  return [part for leaf in jax.tree.leaves(tree) for part in _parts_of(leaf)]


def arrays_in(memory: mmap.mmap, spec: dict[str, list]) -> list[Any]:
  """Returns the arrays that `spec` of `SharedArrays` describes, where they are: NumPy's, or those of several processes."""
  meshes = [_mesh_of_json(mesh) for mesh in spec["meshes"]]
  return [_array_in(memory, meshes, *one) for one in spec["arrays"]]


def _array_in(
  memory: mmap.mmap, meshes: list[Mesh], name: str, shape: list, starts: list, layout: Any
) -> Any:
  if layout is None:
    return np.ndarray(tuple(shape), jnp.dtype(name), memory, starts[0]).view(Unshared)
  axes = [tuple(axis) if isinstance(axis, list) else axis for axis in layout["axes"]]
  sharding = NamedSharding(meshes[layout["mesh"]], PartitionSpec(*axes))
  of_shard = sharding.shard_shape(tuple(shape))
  shards = [
    jax.device_put(np.ndarray(of_shard, jnp.dtype(name), memory, starts[part]), jax.local_devices()[device])
    for device, part in layout["parts"]
  ]
  if any(shard.dtype != name for shard in shards):
    raise TypeError(f"JAX has no {name} here")
  return jax.make_array_from_single_device_arrays(tuple(shape), sharding, shards)


def _parts_of(x: jax.Array) -> list[Any]:
  """Returns what is copied of an array: all of it, or one of each kind of shards that this process has."""
  if jax.process_count() == 1:
    return [x]
  if not isinstance(x, jax.Array) or not isinstance(x.sharding, NamedSharding):
    raise ValueError(f"an array of {np.shape(x)} has no mesh")
  return digests.distinct_shards(x)


def _layout_of(x: jax.Array, meshes: list[Mesh]) -> dict[str, Any] | None:
  """Returns the sharding of an array of several processes, and which of its parts each device of this one has, as JSON."""
  if jax.process_count() == 1:
    return None
  if x.sharding.mesh not in meshes:
    meshes.append(x.sharding.mesh)
  kinds = list({str(shard.index): None for shard in x.addressable_shards})
  return {
    "mesh": meshes.index(x.sharding.mesh),
    "axes": list(x.sharding.spec),
    "parts": [
      [jax.local_devices().index(shard.device), kinds.index(str(shard.index))]
      for shard in x.addressable_shards
    ],
  }


def _mesh_as_json(mesh: Mesh) -> dict[str, Any]:
  """Its devices by process, and number among those of the process: in the other processes, they have other ids."""
  numbers = {device: number for devices in _by_process().values() for number, device in enumerate(devices)}
  devices = [[device.process_index, numbers[device]] for device in mesh.devices.flat]
  return {"names": list(mesh.axis_names), "shape": list(mesh.devices.shape), "devices": devices}


def _mesh_of_json(mesh: dict[str, list]) -> Mesh:
  by_process = _by_process()
  devices = np.array([by_process[process][number] for process, number in mesh["devices"]])
  return Mesh(devices.reshape(mesh["shape"]), tuple(mesh["names"]))


def _by_process() -> dict[int, list[jax.Device]]:
  found: dict[int, list[jax.Device]] = {}
  for device in jax.devices():
    found.setdefault(device.process_index, []).append(device)
  return found


def _is_empty(node: Any) -> bool:
  return node is None or (isinstance(node, dict | list | tuple) and not node)


def _as_json(node: Any) -> Any:
  """Returns a leaf, which is a number, or an empty node, as Orbax tells them apart."""
  if isinstance(node, int | dict):
    return node
  return [] if type(node) in (list, tuple) else None
