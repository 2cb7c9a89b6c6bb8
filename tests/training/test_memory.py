"""What a run needs is known before anything is allocated, and is never more than what the compiler asks for."""

import contextlib
import dataclasses
import math
import types
from typing import NamedTuple

import jax
import numpy as np
import pytest

from moe_jax.cluster import processes
from moe_jax.comparison.comparison import Comparison
from moe_jax.data import load_dataset
from moe_jax.errors import InputError
from moe_jax.sharding import batch_sharding, make_mesh
from moe_jax.training import evaluation, idle_saver, memory
from moe_jax.training.compiled import compile_steps, resolve_config
from moe_jax.training.loop import Run
from moe_jax.training.result_file import write_result
from tests import tiny

CONFIG = resolve_config(tiny.change(tiny.CONFIG, num_layers=1))


@pytest.mark.parametrize(
  ("fields", "share"),
  [
    ({}, 1.0),
    ({"trained": "router", "expert_dim": 256}, 0.01),  # of frozen parameters there is no gradient
    ({"experts": "low_rank:rank=1", "trained": "experts", "expert_dim": 256}, 0.1),  # the adapters
  ],
  ids=str,
)
def test_the_need_is_that_of_the_compiler_or_less(fields, share):
  mesh, config = make_mesh(CONFIG.mesh), tiny.change(CONFIG, **fields)
  with jax.set_mesh(mesh):
    steps = compile_steps(config, tiny.VOCAB, tiny.DOMAINS, mesh)
    batch = jax.device_put(tiny.make_batch(), batch_sharding(mesh))
    compiled = steps.train.lower(steps.abstract_state, batch).compile().memory_analysis()
  need = memory.need_of(config, steps, tiny.VOCAB, mesh)
  in_batch = sum(x.nbytes for x in jax.tree.leaves(batch))
  in_state = compiled.argument_size_in_bytes - in_batch
  assert need.parameters + need.optimizer == pytest.approx(in_state, rel=1e-3)  # without what no step reads
  assert need.gradients + need.activations <= compiled.temp_size_in_bytes
  assert 0 < need.gradients <= share * need.parameters and (need.gradients == need.parameters) == (not fields)


def test_what_cannot_fit_is_refused_before_the_first_arm(tmp_path, monkeypatch):
  """A gigabyte of weights beside an arm that fits; nothing is trained."""
  monkeypatch.setattr(memory, "host_memory", lambda: 2 * memory.GIB)
  arms = {"small": {}, "large": {"expert_dim": 1 << 21}}
  comparison = Comparison(arms, [0], CONFIG, tmp_path / "run")
  message = r"8.05e\+08 parameters need at least 21 GiB .*, copy to save 9\) and this host has 2 GiB; about 7.7e\+07 parameters"
  with pytest.raises(InputError, match=message):
    comparison.run()
  assert not (tmp_path / "run").exists()  # so that another configuration may have it


@dataclasses.dataclass(frozen=True)
class Accelerator:
  """Stands for a device with memory of its own."""

  limit: int
  process_index: int = 0
  platform: str = "gpu"
  device_kind: str = "a GPU"

  def memory_stats(self):
    return {"bytes_limit": self.limit}


class Mesh(NamedTuple):
  devices: np.ndarray
  shape: dict[str, int]


@pytest.mark.parametrize(
  ("device", "host", "line"),
  [
    (1.0, 1.0, ""),
    (0.99, 1.0, r"optimizer .* and a device \(a GPU\) has"),
    (1.0, 0.99, r"GiB \(copy to save [0-9.e-]+\) and this host has"),
  ],
)
def test_devices_and_their_host_are_checked_apart(device, host, line, monkeypatch):
  """Eight accelerators need what a step does, their host what a save copies: once, however many devices hold it."""
  real = make_mesh(CONFIG.mesh)
  steps = compile_steps(CONFIG, tiny.VOCAB, tiny.DOMAINS, real)
  leaves = jax.tree.leaves(steps.abstract_state)
  copy = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
  need = sum(memory.need_of(CONFIG, steps, tiny.VOCAB, real))
  monkeypatch.setattr(memory, "host_memory", lambda: math.ceil(copy * host))
  mesh = Mesh(np.array([Accelerator(int(need * device))] * 8, object), real.shape)
  with contextlib.nullcontext() if not line else pytest.raises(InputError, match=line):
    memory.check_memory(CONFIG, steps, tiny.VOCAB, mesh)


class OneOfTwo:
  """The layout of an array of which this process has the first half, on two devices."""

  def shard_shape(self, shape):
    return (shape[0] // 2, *shape[1:])

  def addressable_devices_indices_map(self, shape):
    return dict.fromkeys(("device 0", "device 1"), (slice(0, shape[0] // 2),))


def test_each_process_copies_its_shards_once(monkeypatch):
  steps = compile_steps(CONFIG, tiny.VOCAB, tiny.DOMAINS, make_mesh(CONFIG.mesh))
  whole = memory.copy_of(steps)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  assert memory.copy_of(steps) == whole  # it has all shards
  state = {"w": jax.ShapeDtypeStruct((8, 3), np.float32), "m": jax.ShapeDtypeStruct((2,), np.int8)}
  half = steps._replace(abstract_state=state, state_shardings={name: OneOfTwo() for name in state})
  assert memory.copy_of(half) == 4 * 3 * 4 + 1
  monkeypatch.setattr(idle_saver, "AVAILABLE", False)
  assert memory.copy_of(half) == 0  # Orbax writes from where a CPU has the arrays
  monkeypatch.setattr(jax, "devices", lambda: [Accelerator(1)])
  assert memory.copy_of(half) == 4 * 3 * 4 + 1


def test_the_check_can_be_turned_off(monkeypatch):
  monkeypatch.setattr(memory, "host_memory", lambda: 1)
  mesh = make_mesh(CONFIG.mesh)
  steps = compile_steps(CONFIG, tiny.VOCAB, tiny.DOMAINS, mesh)
  with pytest.raises(InputError, match="the activations alone do not fit"):
    memory.check_memory(CONFIG, steps, tiny.VOCAB, mesh)
  memory.check_memory(tiny.change(CONFIG, ignore_memory_check=True), steps, tiny.VOCAB, mesh)


def test_a_process_of_many_programs_forgets_them_before_its_next_run(tmp_path, monkeypatch):
  """Linux gives a process 65,530 memory mappings, and XLA ends one that wants more."""
  double = jax.jit(lambda x: 2 * x)
  double(1.0)
  dataset = load_dataset(CONFIG.data)
  Run(CONFIG, dataset, tmp_path / "few")
  assert double._cache_size() == 1
  monkeypatch.setattr(memory, "_MANY_MAPPINGS", 0)
  Run(CONFIG, dataset, tmp_path / "many")
  assert double._cache_size() == 0 and double(1.0) == 2


def test_a_process_forgets_its_programs_where_another_one_has_many(monkeypatch):
  """Otherwise that one alone would compile again what all compile together."""
  double = jax.jit(lambda x: 2 * x)
  for others, kept in (([False], 1), ([False, True], 0)):
    double(1.0)
    with monkeypatch.context() as patch:
      patch.setattr(processes, "from_all", lambda value, others=others: [value, *others])
      memory.make_room_for_programs()
    assert double._cache_size() == kept


def test_room_is_made_before_each_evaluation_of_a_finished_run(tmp_path, monkeypatch):
  run, events = Run(CONFIG, load_dataset(CONFIG.data), tmp_path), []
  write_result(tmp_path / "result.json", {"arm": "a", "seed": 0, "num_steps": 1, "validation": {"nll": 1.0}})
  steps = types.SimpleNamespace(abstract_state=None, state_shardings=None, evaluate=None)
  state = types.SimpleNamespace(step=1)
  monkeypatch.setattr(evaluation, "compile_steps", lambda *args: steps)
  monkeypatch.setattr(evaluation.Checkpoints, "restore", lambda *args: (state, {}))
  monkeypatch.setattr(evaluation, "make_room_for_programs", lambda: events.append("room"))
  monkeypatch.setattr(Run, "evaluate", lambda *args: events.append("evaluation") or {"nll": 1.0})
  evaluation.evaluate_as(run, {"one": CONFIG, "two": CONFIG})
  assert events == ["room", "evaluation"] * 2
