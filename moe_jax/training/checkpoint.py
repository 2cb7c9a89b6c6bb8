"""Orbax checkpoints of a train state and the position in the data, with a digest of every array.

Orbax 0.12 has no digests of its own for this format (its b-tree nodes have checksums, array chunks have none), so a
flipped bit comes back as another number. A digest is computed where the array is, from bits and places, so it is the same on
every mesh and costs one pass over the state.
"""

import contextlib
import functools
import gc
import hashlib
import json
import logging
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from moe_jax import disk
from moe_jax.cluster import processes
from moe_jax.errors import InputError
from moe_jax.training import background
from moe_jax.types import Array, PyTree


class Checkpoints:
  """The checkpoints of one run: saved in the background, restored onto any mesh.

  Every process saves the parts that its devices hold, so all processes must call the same methods in the same order.

  Args:
    folder: created when the first checkpoint is saved; all processes must see the same folder.
    keep: how many of the newest checkpoints to keep.

  Raises:
    InputError: if the name of the folder cannot be used, or the processes see different checkpoints in it.
  """

  def __init__(self, folder: str | os.PathLike[str], keep: int = 2):
    self.folder = pathlib.Path(folder).absolute()
    disk.check_name(self.folder)
    self._keep = keep
    self._manager: ocp.CheckpointManager | None = None
    self._steps = self._list()
    processes.check_agree(
      self._steps,
      f"--output_dir: steps of the checkpoints in {self.folder}",
      "the folder must be on a file system that all processes share",
    )

  @property
  def latest_step(self) -> int | None:
    """The step of the newest checkpoint, or None. It may still be under way, or damaged."""
    return max(self._steps, default=None)

  def _list(self) -> list[int]:
    if not self.folder.is_dir():
      return []
    return sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdecimal() and p.is_dir())

  def save(self, step: int, state: PyTree, extra: dict[str, Any]) -> None:
    """Saves `state` (arrays) and `extra` (JSON values). Does nothing if the step is already saved."""
    if step in self._steps:
      return
    if self._manager is None:
      handlers = {"state": ocp.StandardCheckpointHandler(), "extra": ocp.JsonCheckpointHandler()}
      background.silence()
      in_threads = ocp.options.AsyncOptions(barrier_sync_fn=background.barrier)
      options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, create=True, async_options=in_threads)
      self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)
    kept = {"arrays": array_digests(state), "extra": extra}
    items = ocp.args.Composite(
      state=ocp.args.StandardSave(state), extra=ocp.args.JsonSave(kept | {"digest": _digest_of_json(kept)})
    )
    self._manager.save(step, args=items)
    self._steps.append(step)

  def wait(self) -> None:
    """Waits for a save that is under way."""
    if self._manager:
      self._manager.wait_until_finished()

  def restore(
    self, abstract_state: PyTree, shardings: PyTree, *, move_damaged: bool = False
  ) -> tuple[PyTree, dict[str, Any]]:
    """Returns (state, extra) of the newest whole checkpoint, with each array laid out by its entry in `shardings`.

    A damaged checkpoint is passed over, and one line says so.

    Args:
      abstract_state: the arrays that are expected.
      shardings: of each.
      move_damaged: whether to move a damaged checkpoint to the folder `damaged` of the run, so that its step can be
        saved again. Only for the owner of the run.

    Raises:
      InputError: if a checkpoint holds other arrays than `abstract_state`, or none is whole.
    """
    self.wait()
    target = jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
      abstract_state,
      shardings,
    )
    damaged = []
    for step in sorted(self._steps, reverse=True):
      state, extra, problem = self._read(step, target)
      problem = next(filter(None, processes.from_all(problem)), "")
      problem = problem or _differing(extra["arrays"], array_digests(state))
      if not problem:
        return state, extra["extra"]
      damaged.append(f"the checkpoint of step {step} is damaged ({problem})")
      place = self._pass_over(step, move_damaged)
      if processes.is_first():
        disk.note(f"{self.folder}: {damaged[-1]} and passed over{place}")
    raise InputError(
      f"{self.folder}: no checkpoint is whole: {'; '.join(damaged)}; the same command now begins anew, or restore the "
      "folder from a copy"
    )

  def _read(self, step: int, target: PyTree) -> tuple[PyTree, dict[str, Any], str]:
    """Returns (state, what was saved beside it, what is wrong). Without Orbax's manager, whose barriers would wait for
    a process that cannot read."""
    folder = self.folder / str(step)
    try:
      kept = json.loads((folder / "extra" / "metadata").read_text())
      old = not {"digest", "arrays"} & kept.keys()
      if not old and kept.pop("digest", "") != _digest_of_json(kept):
        return None, {}, "its position in the data does not have the digest that was saved"
    except (OSError, ValueError, AttributeError) as error:
      return None, {}, f"its position in the data cannot be read: {_short(error)}"
    if old:
      raise InputError(f"{folder}: a checkpoint of another version of moe_jax, without digests; train anew")
    self._check_same_arrays(step, kept["arrays"], target)
    with _without_echo():
      handler = ocp.StandardCheckpointHandler()
      try:
        return handler.restore(folder / "state", args=ocp.args.StandardRestore(target)), kept, ""
      except Exception as error:  # whatever damaged bytes lead to
        problem = _short(error)
        time.sleep(0.3)  # other reads that were under way fail, too
      finally:
        handler.close()
    return None, {}, f"its arrays cannot be read: {problem}"

  def _pass_over(self, step: int, move: bool) -> str:
    """Returns where the checkpoint of `step` was moved, in words."""
    self._steps.remove(step)
    place = None
    if move and processes.is_first():
      place = disk.move_aside(self.folder / str(step), self.folder.parent)
    processes.wait_for_all("damaged checkpoint")
    return f", moved to {place}" if place else ""

  def _check_same_arrays(self, step: int, saved: dict[str, list], target: PyTree) -> None:
    expected = _arrays(target)
    saved = {name: kind for name, (kind, _) in saved.items()}
    different = sorted(name for name in saved | expected if saved.get(name) != expected.get(name))
    if different:
      name = different[0]
      raise InputError(
        f"{self.folder / str(step)}: a checkpoint of another configuration or version of moe_jax "
        f"({len(different)} arrays differ, such as {name}: saved {saved.get(name, 'nothing')}, "
        f"expected {expected.get(name, 'nothing')}); choose an empty folder, or what wrote this one"
      )

  def close(self) -> None:
    """Waits for pending saves to finish and closes the manager."""
    if self._manager is None:
      return
    try:
      self._manager.wait_until_finished()
    finally:
      self._manager.close()


def _arrays(tree: PyTree) -> dict[str, str]:
  """path -> type and shape of every array, as a checkpoint names them."""
  leaves = ocp.tree.to_flat_dict(tree, sep=".")
  return {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves.items()}


def array_digests(tree: PyTree) -> dict[str, list]:
  """path -> [type and shape, digest] of every array. Arrays may be laid out over the devices of all processes."""
  leaves = ocp.tree.to_flat_dict(tree, sep=".")
  # One after the other: the collectives of programs that run at the same time may wait for each other, across processes.
  return {path: [kind, int(digest(leaves[path]))] for path, kind in _arrays(tree).items()}


def tree_digest(tree: PyTree) -> str:
  """Returns one digest of all arrays of a tree, the same on every mesh."""
  return _digest_of_json(array_digests(tree))


def all_finite(tree: PyTree) -> bool:
  """Returns whether all numbers of all arrays are finite."""
  found = [
    bool(np.isfinite(x).all() if _in_host_memory(x) else _all_finite(x)) for x in jax.tree.leaves(tree)
  ]
  return all(found)  # of a list: all processes compute the same, one after the other


def digest(x: Array) -> Array:
  """Returns 32 bits that depend on every bit of `x` and its place, and not on how `x` is laid out."""
  return _digest(np, np.asarray(x)) if _in_host_memory(x) else _digest_on_devices(x)


def _in_host_memory(x: Array) -> bool:
  """Whether NumPy can read `x` where it is. A program would have to be compiled for every shape."""
  return isinstance(x, np.ndarray | np.generic) or (
    x.is_fully_addressable and next(iter(x.devices())).platform == "cpu"
  )


_WORDS = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint32"}


def _digest(xp: Any, x: Array) -> Array:
  """The sum over words of MurmurHash3's finalizer of word and place, with the arithmetic of `xp`: NumPy or JAX.

  The finalizer is one to one in the word, so another word always gives another sum. Changes of several words agree by
  chance once in 2^32.
  """
  x = xp.atleast_1d(x.astype("uint8") if x.dtype == bool else x)
  words = x.view(_WORDS[x.dtype.itemsize]).astype("uint32")
  place = xp.zeros((1,) * words.ndim, "uint32")
  for axis, size in enumerate(words.shape):
    own = xp.arange(size, dtype="uint32").reshape(-1, *(1,) * (words.ndim - axis - 1))
    place = place * xp.uint32(size % 2**32) + own[(None,) * axis]
  h = words ^ (place * xp.uint32(0x9E3779B1))
  h = (h ^ (h >> 16)) * xp.uint32(0x85EBCA6B)
  h = (h ^ (h >> 13)) * xp.uint32(0xC2B2AE35)
  return xp.sum(h ^ (h >> 16), dtype="uint32")


_digest_on_devices = jax.jit(functools.partial(_digest, jnp))
_all_finite = jax.jit(lambda x: jnp.isfinite(x).all())


@contextlib.contextmanager
def _without_echo() -> Iterator[None]:
  """Keeps the reads that Orbax drops when one of them fails from printing a page each."""
  hook, log = sys.unraisablehook, logging.getLogger("asyncio")
  before = log.disabled
  sys.unraisablehook, log.disabled = lambda _: None, True
  try:
    yield
  finally:
    gc.collect()
    sys.unraisablehook, log.disabled = hook, before


def _differing(saved: dict[str, list], restored: dict[str, list]) -> str:
  different = [name for name, value in saved.items() if restored[name] != value]
  if not different:
    return ""
  return (
    f"{len(different)} of {len(saved)} arrays do not have the digest that was saved, such as {different[0]}"
  )


def _digest_of_json(value: Any) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _short(error: Exception) -> str:
  return " ".join(f"{type(error).__name__}: {error}".split())[:160]
