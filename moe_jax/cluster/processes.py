"""What the processes of one run tell each other. With one process everything here is at once and free."""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.errors import InputError


def is_first() -> bool:
  """Whether this process writes what is written once."""
  return jax.process_index() == 0


def wait_for_all(name: str) -> None:
  """Returns when every process has come to `name`."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def from_first(value: Any) -> Any:
  """The JSON value of process 0, in every process."""
  return value if jax.process_count() == 1 else from_all(value)[0]


def from_all(value: Any) -> list[Any]:
  """The JSON values of all processes, in every process, by process."""
  if jax.process_count() == 1:
    return [value]
  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  room = _ROOM
  while True:
    row = np.zeros((1, _HEAD + room), np.uint8)
    row[0, :_HEAD] = np.frombuffer(data.size.to_bytes(_HEAD, "little"), np.uint8)
    row[0, _HEAD:][: data.size] = data[:room]
    rows = _all_rows(row)
    sizes = [int.from_bytes(row[:_HEAD].tobytes(), "little") for row in rows]
    if max(sizes) <= room:
      return [json.loads(row[_HEAD:][:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]
    # The same in all processes, and a power of two, so that few programs are compiled.
    room = 1 << (max(sizes) - 1).bit_length()


_HEAD, _ROOM = 8, 4096  # bytes of a number of bytes, and of the bytes that the first exchange has room for


def _all_rows(row: np.ndarray) -> np.ndarray:
  """Returns the rows [1, bytes] of all processes, [processes, bytes], in every process.

  `multihost_utils.process_allgather` takes 3 ms of two CPU processes for what is one collective, and this 0.3 ms.
  """
  by_process, gather = _gather()
  rows = jax.make_array_from_process_local_data(by_process, row, (jax.process_count(), row.shape[1]))
  with jax.set_mesh(by_process.mesh):  # the mesh of a run has other devices
    return np.asarray(gather(rows).addressable_data(0))


@functools.cache
def _gather() -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
  """Returns how rows lie on one device of each process, and a program that gives all rows to each."""
  first = {device.process_index: device for device in reversed(jax.devices())}
  mesh = Mesh(np.array([first[index] for index in sorted(first)]), ("process",))
  everywhere = NamedSharding(mesh, PartitionSpec())
  return NamedSharding(mesh, PartitionSpec("process")), jax.jit(lambda x: x, out_shardings=everywhere)


def check_agree(value: Any, what: str, right: str) -> None:
  """Raises `InputError` in all processes if `value` (JSON) differs between them."""
  values = from_all(value)
  for index, other in enumerate(values):
    if other != values[0]:
      raise InputError(f"{what}: process {index} has {other!r}, process 0 {values[0]!r}; {right}")


@contextlib.contextmanager
def refused_together() -> Iterator[None]:
  """An `InputError` that one process raises inside ends this in all of them, with that line. All must come here."""
  own = None
  try:
    yield
  except InputError as error:
    own = error
  refused = next(filter(None, from_all(str(own or ""))), "")
  if refused:
    raise own or InputError(refused)


@contextlib.contextmanager
def first_writes(name: str) -> Iterator[bool]:
  """`with first_writes("x") as mine: if mine: ...`: process 0 writes, the others wait until it has."""
  yield is_first()
  wait_for_all(name)


class BatchShare(NamedTuple):
  """Which rows of the global batch this process reads: part `index` of `count` equal parts, of those `rows`."""

  index: int
  count: int
  rows: np.ndarray | slice = slice(None)

  def state_to_load(self, state: Any) -> Any:
    """This process's own of `merge_states`, which may come from another number of processes."""
    return _map_rows(
      state, lambda rows: rows[self.index * len(rows) // self.count :][: len(rows) // self.count]
    )


def batch_share(sharding: NamedSharding, batch_size: int) -> BatchShare:
  """The share of the process: the rows of a batch that `sharding` puts on its devices.

  Processes whose devices hold the same rows (an axis that does not split the batch goes across them) read the same
  rows. On a mesh whose device order leaves a process rows that are not one block, it reads the whole batch and keeps
  its own.
  """
  rows: dict[int, set[int]] = {}
  for device, index in sharding.devices_indices_map((batch_size,)).items():
    rows.setdefault(device.process_index, set()).update(range(batch_size)[index[0]])
  own = np.array(sorted(rows[jax.process_index()]))
  if all(_is_part(sorted(part), batch_size) for part in rows.values()):
    return BatchShare(int(own[0]) // len(own), batch_size // len(own))
  return BatchShare(0, 1, own)


def _is_part(rows: list[int], batch_size: int) -> bool:
  """Whether the rows are one of the equal parts of the batch."""
  count, begin = len(rows), rows[0]
  return rows[-1] - begin + 1 == count and batch_size % count == 0 and begin % count == 0


def merge_states(states: Mapping[int, Any]) -> Any:
  """One state of the data from those of all parts, by `index`. Lists, which have an entry per row, follow each other."""
  parts = [states[i] for i in sorted(states)]
  if all(isinstance(part, list) for part in parts):  # also where they are equal: each is of other rows
    return [row for part in parts for row in part]
  if all(isinstance(part, dict) for part in parts):
    return {name: merge_states({i: part[name] for i, part in enumerate(parts)}) for name in parts[0]}
  return parts[0]


def _map_rows(state: Any, function: Callable[[list], list]) -> Any:
  if isinstance(state, dict):
    return {name: _map_rows(value, function) for name, value in state.items()}
  return function(state) if isinstance(state, list) else state
