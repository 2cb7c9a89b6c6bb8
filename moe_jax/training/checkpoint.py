"""Orbax checkpoints of a train state and the position in the data."""

import os
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from moe_jax.cluster import processes
from moe_jax.errors import InputError
from moe_jax.types import PyTree


class Checkpoints:
  """The checkpoints of one run: saved in the background, restored onto any mesh.

  Every process saves the parts that its devices hold, so all processes must call the same methods in the same order.

  Args:
    folder: created when the first checkpoint is saved; all processes must see the same folder.
    keep: how many of the newest checkpoints to keep.

  Raises:
    InputError: if the processes see different checkpoints in the folder.
  """

  def __init__(self, folder: str | os.PathLike[str], keep: int = 2):
    self.folder = pathlib.Path(folder).absolute()
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    handlers = {"state": ocp.StandardCheckpointHandler(), "extra": ocp.JsonCheckpointHandler()}
    self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)
    processes.check_agree(
      self.latest_step,
      f"--output_dir: newest checkpoint in {self.folder}",
      "the folder must be on a file system that all processes share",
    )

  @property
  def latest_step(self) -> int | None:
    """The step of the newest complete checkpoint, or None."""
    return self._manager.latest_step()

  def save(self, step: int, state: PyTree, extra: dict[str, Any]) -> None:
    """Saves `state` (arrays) and `extra` (JSON values). Does nothing if the step is already saved."""
    if step == self.latest_step:
      return
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), extra=ocp.args.JsonSave(extra))
    self._manager.save(step, args=items)

  def restore(self, abstract_state: PyTree, shardings: PyTree) -> tuple[PyTree, dict[str, Any]]:
    """Returns (state, extra) of the newest checkpoint, with each array laid out by its entry in `shardings`.

    Raises:
      InputError: the checkpoint holds other arrays than `abstract_state`.
    """
    self._manager.wait_until_finished()  # the newest may be under way
    self._check_same_arrays(abstract_state)
    target = jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
      abstract_state,
      shardings,
    )
    items = ocp.args.Composite(state=ocp.args.StandardRestore(target), extra=ocp.args.JsonRestore())
    restored = self._manager.restore(self.latest_step, args=items)
    return restored.state, restored.extra

  def _check_same_arrays(self, abstract_state: PyTree) -> None:
    """Orbax says the same in a page of text, after it began to read."""
    saved = _arrays(self._manager.item_metadata(self.latest_step)["state"].tree)
    expected = _arrays(abstract_state)
    different = sorted(name for name in saved | expected if saved.get(name) != expected.get(name))
    if different:
      name = different[0]
      raise InputError(
        f"{self.folder / str(self.latest_step)}: a checkpoint of another configuration or version of moe_jax "
        f"({len(different)} arrays differ, such as {name}: saved {saved.get(name, 'nothing')}, "
        f"expected {expected.get(name, 'nothing')}); choose an empty folder, or what wrote this one"
      )

  def close(self) -> None:
    """Waits for pending saves to finish and closes the manager."""
    try:
      self._manager.wait_until_finished()
    finally:
      self._manager.close()


def _arrays(tree: PyTree) -> dict[str, str]:
  """path -> type and shape of every array, as a checkpoint names them."""
  leaves = ocp.tree.to_flat_dict(tree, sep=".")
  return {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves.items()}
