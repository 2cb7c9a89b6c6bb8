"""Digests of arrays: 32 bits that depend on every bit and its place, and not on the mesh.

A digest is computed where the array is. It costs one pass over it.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from moe_jax import disk
from moe_jax.types import Array, PyTree


def kinds_of_arrays(tree: PyTree) -> dict[str, str]:
  """path -> type and shape of every array, as a checkpoint names them."""
  leaves = ocp.tree.to_flat_dict(tree, sep=".")
  return {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves.items()}


def array_digests(tree: PyTree) -> dict[str, list]:
  """path -> [type and shape, digest] of every array. Arrays may be laid out over the devices of all processes."""
  leaves = ocp.tree.to_flat_dict(tree, sep=".")
  # One after the other: the collectives of programs that run at the same time may wait for each other, across processes.
  return {path: [kind, int(digest(leaves[path]))] for path, kind in kinds_of_arrays(tree).items()}


def own_part(x: jax.Array) -> int:
  """Returns what the devices of this process add to the digest of `x`: that is the sum of all processes' parts, in 32 bits.

  The shards must be in host memory. Of those that are equal, one counts.
  """
  own = [shard for shard in x.addressable_shards if shard.replica_id == 0]
  starts = [[part.start or 0 for part in shard.index] for shard in own]
  parts = [int(_digest(np, np.asarray(a.data), b, x.shape)) for a, b in zip(own, starts, strict=True)]
  return sum(parts) % 2**32


def tree_digest(tree: PyTree) -> str:
  """Returns one digest of all arrays of a tree, the same on every mesh."""
  return disk.digest_of_json(array_digests(tree))


def with_bad_numbers(trees: Mapping[str, PyTree]) -> list[str]:
  """Returns the names of those trees in which a floating-point number of any array is not finite, as far as this process has it.

  All processes must call it: what is not in host memory is looked at by a program of all.
  """
  floating = lambda tree: [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
  return [name for name, tree in trees.items() if not all(map(_all_finite, floating(tree)))]


def _all_finite(x: Array) -> bool:
  """Returns whether all numbers of `x` are finite: those of this process where its shards are in host memory, and else all."""
  if in_host_memory(x):
    return bool(np.isfinite(x).all())
  shards = distinct_shards(x)
  if all(in_host_memory(shard) for shard in shards):
    return all(np.isfinite(shard).all() for shard in shards)
  return bool(_all_finite_on_devices(x))


def distinct_shards(x: jax.Array) -> list[jax.Array]:
  """Returns one of each kind of shards that the devices of this process have: replicas are equal."""
  return [x.addressable_data(index) for index in _of_each_kind(x.sharding, x.shape)]


@functools.lru_cache(4096)
def _of_each_kind(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> list[int]:
  """Returns the places of one of each kind of shards among those of this process. To find them takes as long as to read small ones."""
  kinds = [str(index) for index in sharding.addressable_devices_indices_map(shape).values()]
  return [kinds.index(kind) for kind in dict.fromkeys(kinds)]


def digest(x: Array) -> Array:
  """Returns 32 bits that depend on every bit of `x` and its place, and not on how `x` is laid out."""
  return _digest(np, np.asarray(x)) if in_host_memory(x) else _digest_on_devices(x)


def in_host_memory(x: Array) -> bool:
  """Whether NumPy can read `x` where it is. A program would have to be compiled for every shape."""
  return isinstance(x, np.ndarray | np.generic) or (
    x.is_fully_addressable and next(iter(x.devices())).platform == "cpu"
  )


# Types that JAX and NumPy keep in other bytes, or do not view as words. All their numbers are those of a wider one, too.
_WIDER = {"bool": "uint8", "int2": "int8", "int4": "int8", "uint2": "uint8", "uint4": "uint8"}
_WIDER["float4_e2m1fn"] = "float16"
_WORDS = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint32"}


def _digest(xp: Any, x: Array, start: Sequence[int] = (), whole: Sequence[int] = ()) -> Array:
  """The sum over words of MurmurHash3's finalizer of word and place, with the arithmetic of `xp`: NumPy or JAX.

  The finalizer is one to one in the word, so another word always gives another sum. Changes of several words agree by
  chance once in 2^32. `x` may be the part that begins at `start` of an array with shape `whole`.
  """
  x = xp.atleast_1d(x.astype(_WIDER[x.dtype.name]) if x.dtype.name in _WIDER else x)
  words = x.view(_WORDS[x.dtype.itemsize]).astype("uint32")
  of_last = words.shape[-1] // x.shape[-1] if x.size else 1  # words of a number
  start, whole = [*(start or [0] * x.ndim)], [*(whole or x.shape)]
  start[-1], whole[-1] = start[-1] * of_last, whole[-1] * of_last
  place = xp.zeros((1,) * words.ndim, "uint32")
  for axis, size in enumerate(words.shape):
    own = xp.arange(size, dtype="uint32").reshape(-1, *(1,) * (words.ndim - axis - 1))
    place = place * xp.uint32(whole[axis] % 2**32) + (own + xp.uint32(start[axis] % 2**32))[(None,) * axis]
  h = words ^ (place * xp.uint32(0x9E3779B1))
  h = (h ^ (h >> 16)) * xp.uint32(0x85EBCA6B)
  h = (h ^ (h >> 13)) * xp.uint32(0xC2B2AE35)
  return xp.sum(h ^ (h >> 16), dtype="uint32")


_digest_on_devices = jax.jit(functools.partial(_digest, jnp))
_all_finite_on_devices = jax.jit(lambda x: jnp.isfinite(x).all())
