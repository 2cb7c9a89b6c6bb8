"""All dispatchers by name: those that leave the exchange between devices to XLA, and those that write it out.

  einsum, sorted           capacity buffers; XLA's partitioner inserts the all-to-alls (GShard, 2006.16668)
  dropless[:OPTIONS]       no capacity; devices sort their own tokens, send rows to the experts' devices and back
  all_to_all[:OPTIONS]     the same exchange with a capacity
  all_gather[:OPTIONS]     sends tokens to every device of the expert group; for small groups

Every one has the signature of `moe_jax.ops.dispatch`; the last three hand each device its part of the experts' weights. docs/adr/0006 has the reasons.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

from moe_jax.errors import InputError, require_option
from moe_jax.ops.dispatch import einsum_dispatch, sorted_dispatch
from moe_jax.ops.once import made_once
from moe_jax.registry import Registry, Spec
from moe_jax.sharding.all_gather import all_gather_dispatch
from moe_jax.sharding.all_to_all import Options, all_to_all_dispatch
from moe_jax.sharding.capacity import SCOPES
from moe_jax.sharding.exchange import FORMS


class Dispatcher(NamedTuple):
  """A dispatcher and its properties."""

  dispatch: Callable  # see moe_jax/ops/dispatch/__init__.py
  never_drops: bool = False
  spells_exchange: bool = False  # gathers parameters that are kept in parts, too
  small_groups: bool = False  # its cost per token grows with the routing group
  marks_from: float = math.inf  # devices of an expert group from which on it marks rows for --remat=exchange


def einsum() -> Dispatcher:
  """GShard's dispatch and combine tensors."""
  return Dispatcher(einsum_dispatch, small_groups=True, marks_from=1)


def sorted_() -> Dispatcher:
  """Tokens gathered by index into capacity buffers."""
  return Dispatcher(sorted_dispatch, marks_from=1)


def all_to_all(
  capacity: str = "group", chunks: int = 1, buffer_factor: float = 0.0, exchange: str = "auto"
) -> Dispatcher:
  """Rows are sent to the devices that hold their experts.

  Args:
    capacity: which groups share an expert's slots. `group`: each routing group has its own slots. `device`: the
      groups of one device share theirs. `global`: all groups of the expert group of devices share theirs
      (MiniMax-01's global router, 2501.08313). Groups fill shared slots in order. `none`: no limit. Only `group`
      and `none` give the same results on every mesh.
    chunks: the number of parts in which a device exchanges its entries, so that the matmul of one part can overlap
      with the exchange of another.
    buffer_factor: if b > 0, a device sends to another at most b times its fair share of a chunk's entries, and
      later entries drop. This also bounds the memory. 0: buffers have room for all rows that can arrive.
    exchange: `ragged` sends only the rows that exist. `padded` sends buffers of a fixed size, for devices without
      a ragged exchange. `auto`: padded on CPU, otherwise ragged.

  Raises:
    InputError: if an option has any other value.
  """
  require_option("dispatcher all_to_all", "capacity", capacity, SCOPES)
  require_option("dispatcher all_to_all", "exchange", exchange, FORMS)
  if chunks < 1:
    raise InputError(f"dispatcher all_to_all: chunks must be 1 or more, got {chunks}")
  if buffer_factor < 0 or not math.isfinite(buffer_factor):
    raise InputError(
      f"dispatcher all_to_all: buffer_factor must be 0 (room for all) or more, got {buffer_factor}"
    )
  options = Options(capacity, chunks, buffer_factor, exchange)
  dispatch = functools.partial(all_to_all_dispatch, options=options)
  return Dispatcher(dispatch, capacity == "none" and not buffer_factor, spells_exchange=True, marks_from=2)


def dropless(chunks: int = 1, buffer_factor: float = 0.0, exchange: str = "auto") -> Dispatcher:
  """`all_to_all` without a capacity. On one device, this is the grouped product over all sorted tokens."""
  return all_to_all("none", chunks, buffer_factor, exchange)


def all_gather(capacity: str = "none") -> Dispatcher:
  """Tokens are sent to all devices of the expert group. `capacity` is the same as in `all_to_all`."""
  require_option("dispatcher all_gather", "capacity", capacity, SCOPES)
  dispatch = functools.partial(all_gather_dispatch, scope=capacity)
  return Dispatcher(dispatch, capacity == "none", spells_exchange=True)


DISPATCHERS = Registry(
  "dispatcher",
  {
    "einsum": einsum,
    "sorted": sorted_,
    "dropless": dropless,
    "all_to_all": all_to_all,
    "all_gather": all_gather,
  },
)


def make_dispatcher(dispatcher: Spec | Dispatcher) -> Dispatcher:
  """Returns a dispatcher as it is, or what a name such as `dropless:chunks=4` stands for."""
  return dispatcher if isinstance(dispatcher, Dispatcher) else made_once(DISPATCHERS.resolve(dispatcher))


__all__ = ["DISPATCHERS", "Dispatcher", "make_dispatcher"]
