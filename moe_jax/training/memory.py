"""Whether a run can fit into memory, before anything is allocated: a host that runs out of it hangs without a word.

Also, room for the programs of many runs in one process.
"""

import dataclasses
import gc
import itertools
import math
import os
import pathlib
from typing import NamedTuple

import jax

from moe_jax.cluster import processes
from moe_jax.config import Config
from moe_jax.errors import InputError
from moe_jax.nn.variables import per_variable
from moe_jax.sharding import BATCH_AXES
from moe_jax.training import idle_saver
from moe_jax.training.compiled import CompiledSteps
from moe_jax.training.optim import is_frozen
from moe_jax.types import PyTree

GIB = 2**30
# Of the 65,530 memory mappings that Linux lets a process have. The programs of one run take 1,000 to 2,000.
_MANY_MAPPINGS = 45_000


class Need(NamedTuple):
  """Bytes on one device that a step holds at the same time, at least."""

  parameters: int
  gradients: int  # of what is trained; no others are computed
  optimizer: int  # moments, and the state of balancers and hooks
  activations: int  # inputs of the layers, which the backward pass starts from, and the logits


def need_of(config: Config, steps: CompiledSteps, vocab_size: int, mesh: jax.sharding.Mesh) -> Need:
  """Returns a lower bound of what the training step of a resolved configuration needs. Allocates nothing."""
  state, layout = steps.abstract_state, steps.state_shardings
  of_parameters = _sizes(state.params, layout.params)
  is_trained = jax.tree.leaves(per_variable(lambda variable: not is_frozen(variable))(state.params))
  parameters = sum(of_parameters)
  gradients = sum(itertools.compress(of_parameters, is_trained))
  whole = sum(_sizes(state, layout))
  parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
  tokens = config.data.batch_size * config.data.sequence_length / config.train.accumulation / parts
  size = 2 if config.model.compute_dtype == "bfloat16" else 4
  layers = sum(len(segment.pattern) * segment.repeats for segment in config.model.blocks)
  activations = tokens * (config.model.model_dim * size * layers + 2 * size * vocab_size)
  return Need(parameters, gradients, whole - parameters, int(activations))


def copy_of(steps: CompiledSteps) -> int:
  """Returns the bytes of host memory that a process needs, at least, for the copy of the state that a save writes.

  A run saves while it trains, so it has both. One process copies the whole state, and of several each copies its shards, of those that
  are equal one. Where several have nobody beside them (`idle_saver`), shards that are in host memory are written from there.
  """
  leaves, layouts = jax.tree.leaves(steps.abstract_state), jax.tree.leaves(steps.state_shardings)
  if jax.process_count() == 1:
    return sum(x.size * x.dtype.itemsize for x in leaves)
  if jax.devices()[0].platform == "cpu" and not idle_saver.AVAILABLE:
    return 0
  found = 0
  for x, layout in zip(leaves, layouts, strict=True):
    shards = {str(index) for index in layout.addressable_devices_indices_map(x.shape).values()}
    found += len(shards) * math.prod(layout.shard_shape(x.shape)) * x.dtype.itemsize
  return found


def check_memory(config: Config, steps: CompiledSteps, vocab_size: int, mesh: jax.sharding.Mesh) -> None:
  """Raises `InputError` if a device, or this host, has less memory than a step and a save need.

  Args:
    config: resolved. Nothing is checked with `ignore_memory_check`.
    steps: its steps, not run yet.
    vocab_size: V of the text.
    mesh: of the run.
  """
  if config.train.ignore_memory_check:
    return
  need = need_of(config, steps, vocab_size, mesh)
  own = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
  on_host, num_params = (
    own[0].platform == "cpu",
    sum(x.size for x in jax.tree.leaves(steps.abstract_state.params)),
  )
  sharing = len(own) if on_host else 1
  needed = {name: bytes * sharing for name, bytes in need._asdict().items()}
  copy = {"copy to save": copy_of(steps)}
  if on_host:
    _check("this host", host_memory(), needed | copy, num_params)
    return
  limits = [(device.memory_stats() or {}).get("bytes_limit") for device in own]
  available = None if None in limits else min(limits)
  _check(f"a device ({own[0].device_kind})", available, needed, num_params)
  _check("this host", host_memory(), copy, num_params)


def _check(where: str, available: int | None, needed: dict[str, int], num_params: int) -> None:
  """Raises `InputError` if `where` has less memory than the sum of the parts. None: nobody says how much it has."""
  total, activations = sum(needed.values()), needed.get("activations", 0)
  if available is None or total <= available:
    return
  fits = num_params * (available - activations) / (total - activations)
  advice = (
    f"about {fits:.2g} parameters would fit with this batch"
    if fits >= 1
    else "the activations alone do not fit"
  )
  parts = ", ".join(f"{name} {bytes / GIB:.3g}" for name, bytes in needed.items())
  raise InputError(
    f"{num_params:.3g} parameters need at least {total / GIB:.3g} GiB ({parts}) and {where} has "
    f"{available / GIB:.3g} GiB; {advice}: use a smaller model or batch, or more devices (--fsdp_parallelism, "
    "--expert_parallelism); --ignore_memory_check starts it anyway"
  )


def _sizes(tree: PyTree, layout: PyTree) -> list[int]:
  """The bytes of one device's part of each array."""
  leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(layout), strict=True)
  return [math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize for x, sharding in leaves]


def host_memory() -> int | None:
  """Returns the bytes that this process can still have, swap included; None if nobody says."""
  found = []
  try:
    lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    found.append(sizes["MemAvailable"] + sizes.get("SwapFree", 0))
  except (OSError, ValueError, KeyError, IndexError):
    try:
      found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (OSError, ValueError):
      return None
  for limit, used in (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
  ):
    root = pathlib.Path("/sys/fs/cgroup")
    try:
      found.append(int((root / limit).read_text()) - int((root / used).read_text()))
    except (OSError, ValueError):  # no container, or one without a limit
      continue
  return min(found)


def sizes_of(config: Config) -> Config:
  """Returns what decides about the memory of a configuration, up to routers and balancers, which have little."""
  moe = dataclasses.replace(config.model.moe, router="", balancers="", dispatcher="", jitter=0.0)
  return dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))


def make_room_for_programs() -> None:
  """Forgets what JAX has compiled if this process, or another one of the run, has many memory mappings.

  A compiled program keeps its mappings, and XLA ends a process that gets no more, which a comparison of some forty
  arms would reach. What is used again is compiled again, in all processes, for some of the programs are compiled together.
  All processes must call it.
  """
  try:
    mappings = pathlib.Path("/proc/self/maps").read_bytes().count(b"\n")
  except OSError:  # only Linux says
    mappings = 0
  if any(processes.from_all(mappings > _MANY_MAPPINGS)):
    jax.clear_caches()
    gc.collect()
