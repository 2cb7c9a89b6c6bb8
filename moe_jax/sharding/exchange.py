"""Rows to the devices that hold their experts, and back.

P devices form an expert group and hold E experts each, so fields [P, E] say something of expert e of device
p. A device keeps what it sends sorted by device and expert. What it receives is sorted by expert, then by
sender: the order that the grouped product wants, so nothing is moved again after the exchange.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.types import Array

FORMS = ("auto", "ragged", "padded")


class Plan(NamedTuple):
  """Which rows one device sends and receives: one slice for each device and expert. All int32 [P, E]."""

  send_start_PE: Array  # where the rows for device p begin here
  send_size_PE: Array
  there_start_PE: Array  # where those rows begin on device p, once there
  recv_start_PE: Array  # where the rows from device p begin here
  recv_size_PE: Array
  from_start_PE: Array  # where those rows began on device p

  def back(self) -> "Plan":
    """Every row to where it came from."""
    return Plan(
      self.recv_start_PE,
      self.recv_size_PE,
      self.from_start_PE,
      self.send_start_PE,
      self.send_size_PE,
      self.there_start_PE,
    )


def make_plan(counts_PPE: Array, me: Array | int) -> Plan:
  """The plan of device `me`. `counts_PPE[p, q, e]`: rows that device p has for expert e of device q."""
  by_device = _starts(counts_PPE)
  by_expert = _starts(counts_PPE.transpose(1, 2, 0)).transpose(2, 0, 1)
  return Plan(
    by_device[me], counts_PPE[me], by_expert[me], by_expert[:, me], counts_PPE[:, me], by_device[:, me]
  )


def _starts(size_PXX: Array) -> Array:
  """Where each slice begins if those of a device follow each other, in the order of the last two axes."""
  flat = size_PXX.reshape(size_PXX.shape[0], -1)
  return (jnp.cumsum(flat, axis=1, dtype=jnp.int32) - flat).reshape(size_PXX.shape)


class Shape(NamedTuple):
  """What the compiler must know of an exchange. The caller guarantees the numbers of rows as upper bounds."""

  axis: str  # the mesh axis of the expert group
  form: str  # one of FORMS; auto: padded on CPU, which has no ragged exchange, else ragged
  rows_here: int  # of the operand
  rows_there: int  # of the result
  rows_per_pair: int  # from any device to any other; only the padded form reads it

  def back(self) -> "Shape":
    return self._replace(rows_here=self.rows_there, rows_there=self.rows_here)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def exchange(rows_MD: Array, plan: Plan, shape: Shape) -> Array:
  """The received rows [rows_there, D] of this device; zeros where nothing arrives.

  Inside `jax.shard_map`. The gradient is the same exchange the other way, and needs no message about offsets.
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
  """Input offsets, send sizes, output offsets (on the receivers), receive sizes of `ragged_all_to_all`."""
  fields = plan.send_start_PE, plan.send_size_PE, plan.there_start_PE, plan.recv_size_PE
  return tuple(field.reshape(-1) for field in fields)


def _ragged(rows_MD, plan, shape):
  out = jnp.zeros((shape.rows_there, rows_MD.shape[1]), rows_MD.dtype)
  return lax.ragged_all_to_all(rows_MD, out, *ragged_arguments(plan), axis_name=shape.axis)


def _padded(rows_MD, plan, shape):
  """Each pair of devices exchanges a buffer of `rows_per_pair` rows, whatever is in it."""
  from_PR = padded_index(plan.send_start_PE, plan.send_size_PE, shape.rows_per_pair, shape.rows_here)
  to_PR = padded_index(plan.recv_start_PE, plan.recv_size_PE, shape.rows_per_pair, shape.rows_there)
  sent_PRD = rows_MD.at[from_PR].get(mode="fill", fill_value=0)
  got_PRD = lax.all_to_all(sent_PRD, shape.axis, 0, 0, tiled=True)
  out = jnp.zeros((shape.rows_there, rows_MD.shape[1]), rows_MD.dtype)
  return out.at[to_PR].set(got_PRD, mode="drop")


def padded_index(start_PE: Array, size_PE: Array, rows: int, nowhere: int) -> Array:
  """[P, rows]: the slices of each device one behind the other, as row numbers; `nowhere` behind the last."""

  def of_device(start_E, size_E):
    end_E = jnp.cumsum(size_E, dtype=jnp.int32)
    row_R = jnp.arange(rows, dtype=jnp.int32)
    slice_R = jnp.minimum(jnp.searchsorted(end_E, row_R, side="right"), size_E.shape[0] - 1)
    index_R = (start_E - (end_E - size_E))[slice_R] + row_R
    return jnp.where(row_R < end_E[-1], index_R, nowhere)

  return jax.vmap(of_device)(start_PE, size_PE)
