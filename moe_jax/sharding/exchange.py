"""Sends rows to the devices that hold their experts, and back.

P devices form an expert group and hold O experts each. Fields [P, O] are about expert o of device p. A device
sorts the rows it sends by device and expert. The rows it receives are sorted by expert, then by sender. The grouped
product needs this order, so no rows are moved after the exchange.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.types import Array

FORMS = ("auto", "ragged", "padded")


class Plan(NamedTuple):
  """The rows that one device sends and receives: one slice per device and expert. All fields are int32 [P, O]."""

  send_start_PO: Array  # where the rows for device p begin on this device
  send_size_PO: Array
  there_start_PO: Array  # where the rows for device p begin there, after the exchange
  recv_start_PO: Array  # where the rows from device p begin on this device
  recv_size_PO: Array
  from_start_PO: Array  # where the rows from device p began there, before the exchange

  def back(self) -> "Plan":
    """Returns the plan that sends every row back to where it came from."""
    return Plan(
      self.recv_start_PO,
      self.recv_size_PO,
      self.from_start_PO,
      self.send_start_PO,
      self.send_size_PO,
      self.there_start_PO,
    )


def make_plan(counts_PPO: Array, me: Array | int) -> Plan:
  """Returns the plan of device `me`. `counts_PPO[p, q, o]`: the rows of device p for expert o of device q."""
  by_device = _starts(counts_PPO)
  by_expert = _starts(counts_PPO.transpose(1, 2, 0)).transpose(2, 0, 1)
  return Plan(
    by_device[me], counts_PPO[me], by_expert[me], by_expert[:, me], counts_PPO[:, me], by_device[:, me]
  )


def _starts(size_PXY: Array) -> Array:
  """Returns where each slice begins if a device's slices are contiguous, in the order of the last two axes."""
  flat = size_PXY.reshape(size_PXY.shape[0], -1)
  return (jnp.cumsum(flat, axis=1, dtype=jnp.int32) - flat).reshape(size_PXY.shape)


class Shape(NamedTuple):
  """The static description of an exchange. The caller guarantees that the numbers of rows are upper bounds."""

  axis: str  # the mesh axis of the expert group
  form: str  # one of FORMS; auto: padded on CPU, which has no ragged exchange, otherwise ragged
  rows_here: int  # rows of the operand
  rows_there: int  # rows of the result
  rows_per_pair: int  # from any device to any other; only the padded form reads it

  def back(self) -> "Shape":
    return self._replace(rows_here=self.rows_there, rows_there=self.rows_here)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def exchange(rows_MD: Array, plan: Plan, shape: Shape) -> Array:
  """Returns the rows that this device receives, [rows_there, D], with zeros where nothing arrives.

  Call this inside `jax.shard_map`. The gradient is the reverse exchange, and no offsets are communicated for it.
  """
  if shape.form == "padded":
    return _padded(rows_MD, plan, shape)
  if shape.form == "ragged":
    return _ragged(rows_MD, plan, shape)
  forms = (functools.partial(form, shape=shape) for form in (_padded, _ragged))
  return lax.platform_dependent(rows_MD, plan, **dict(zip(("cpu", "default"), forms)))


exchange.defvjp(
  lambda rows_MD, plan, shape: (exchange(rows_MD, plan, shape), plan),
  lambda shape, plan, d_out: (exchange(d_out, plan.back(), shape.back()), None),
)


def ragged_arguments(plan: Plan) -> tuple[Array, Array, Array, Array]:
  """Returns input offsets, send sizes, output offsets (on the receivers) and receive sizes for `ragged_all_to_all`."""
  fields = plan.send_start_PO, plan.send_size_PO, plan.there_start_PO, plan.recv_size_PO
  return tuple(field.reshape(-1) for field in fields)


def _ragged(rows_MD, plan, shape):
  out = jnp.zeros((shape.rows_there, rows_MD.shape[1]), rows_MD.dtype)
  return lax.ragged_all_to_all(rows_MD, out, *ragged_arguments(plan), axis_name=shape.axis)


def _padded(rows_MD, plan, shape):
  """Each pair of devices exchanges a buffer of `rows_per_pair` rows, however many of them are used."""
  from_PX = padded_index(plan.send_start_PO, plan.send_size_PO, shape.rows_per_pair, shape.rows_here)
  to_PX = padded_index(plan.recv_start_PO, plan.recv_size_PO, shape.rows_per_pair, shape.rows_there)
  sent_PXD = rows_MD.at[from_PX].get(mode="fill", fill_value=0)
  got_PXD = lax.all_to_all(sent_PXD, shape.axis, 0, 0, tiled=True)
  out = jnp.zeros((shape.rows_there, rows_MD.shape[1]), rows_MD.dtype)
  return out.at[to_PX].set(got_PXD, mode="drop")


def padded_index(start_PO: Array, size_PO: Array, rows: int, nowhere: int) -> Array:
  """Returns the row numbers of each device's concatenated slices, [P, rows], followed by `nowhere`."""

  def of_device(start_O, size_O):
    end_O = jnp.cumsum(size_O, dtype=jnp.int32)
    row_X = jnp.arange(rows, dtype=jnp.int32)
    slice_X = jnp.minimum(jnp.searchsorted(end_O, row_X, side="right"), size_O.shape[0] - 1)
    index_X = (start_O - (end_O - size_O))[slice_X] + row_X
    return jnp.where(row_X < end_O[-1], index_X, nowhere)

  return jax.vmap(of_device)(start_PO, size_PO)
