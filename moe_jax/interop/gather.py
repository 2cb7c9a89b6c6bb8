"""Whole arrays on the host, from parts that the devices of several processes hold."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec


def fetch(value: jax.Array, lead: tuple[int, ...]) -> np.ndarray:
  """Returns value[lead] as an array on the host.

  Where other processes hold parts of it, all must call this with the same arguments in the same order. No device then
  holds more than value[lead] beside its own part.
  """
  if not value.is_fully_addressable and not value.is_fully_replicated:
    spec = (*value.sharding.spec, *[None] * (value.ndim - len(value.sharding.spec)))
    whole = _gatherer(value.sharding.mesh, spec, len(lead))(value, jnp.asarray(lead, jnp.int32))
    return np.asarray(whole.addressable_data(0))
  out = np.empty(value.shape[len(lead) :], value.dtype)
  for shard in value.addressable_shards:
    first, rest = shard.index[: len(lead)], shard.index[len(lead) :]
    starts = [part.indices(size)[0] for part, size in zip(first, value.shape, strict=False)]
    own = tuple(i - start for i, start in zip(lead, starts, strict=True))
    if all(0 <= i < n for i, n in zip(own, shard.data.shape, strict=False)):
      on_host = shard.device.platform == "cpu"
      part = np.asarray(shard.data)[own] if on_host else np.asarray(shard.data[own])
      if part.shape == out.shape:
        return part
      if shard.replica_id == 0:
        out[rest] = part
  return out


@functools.cache
def _gatherer(mesh: jax.sharding.Mesh, spec: tuple, num_lead: int) -> Callable[..., jax.Array]:
  """Returns a compiled (value, lead) -> value[lead], on every device.

  Devices without the index add zeros: XLA would gather the axis that is indexed. Integers are added, for a sum of
  floats has no negative zero.
  """

  def on_device(part: jax.Array, lead: jax.Array) -> jax.Array:
    mine = jnp.bool_(True)
    for axes, index in zip(spec[:num_lead], lead):
      own = index - part.shape[0] * lax.axis_index(axes) if axes else index
      mine &= (own >= 0) & (own < part.shape[0])
      part = lax.dynamic_index_in_dim(part, jnp.clip(own, 0, part.shape[0] - 1), keepdims=False)
    bits = lax.bitcast_convert_type(part, f"uint{8 * part.dtype.itemsize}")
    bits = jnp.where(mine, bits, jnp.zeros_like(bits))
    held = [axis for axes in spec[:num_lead] for axis in _names(axes)]
    bits = lax.psum(bits, held) if held else bits
    for dimension, axes in enumerate(spec[num_lead:]):
      if axes:
        bits = lax.all_gather(bits, axes, axis=dimension, tiled=True)
    return lax.bitcast_convert_type(bits, part.dtype)

  whole = PartitionSpec()
  run = jax.shard_map(
    on_device, mesh=mesh, in_specs=(PartitionSpec(*spec), whole), out_specs=whole, check_vma=False
  )
  return jax.jit(run, out_shardings=NamedSharding(mesh, whole))


def _names(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
  return (axes,) if isinstance(axes, str) else tuple(axes or ())
