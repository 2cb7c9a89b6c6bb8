"""Two real processes, each with another one beside it that writes its part of a checkpoint. One process reads them."""

import contextlib
import json
import os
import signal
import time

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.config import MeshConfig
from moe_jax.data import load_dataset
from moe_jax.errors import NonFiniteLoss
from moe_jax.training import digests, idle_saver, loop, saving
from moe_jax.training.checkpoint import Checkpoints
from moe_jax.training.compiled import compile_steps
from moe_jax.training.orbax_writer import OrbaxWriter
from tests import tiny
from tests.cluster.pair import run_two

pytestmark = pytest.mark.skipif(not idle_saver.AVAILABLE, reason="Linux only")

# Shapes and layouts over the axes a (across the processes) and b (within each).
LAYOUTS = {
  "both": ((8, 6), [["a", "b"], None]),
  "across": ((4, 3), [None, None]),
  "rows": ((6, 4), ["a", None]),
  "columns": ((3, 4), [None, "b"]),
  "turned": ((2, 4, 2), ["b", "a", None]),
  "scalar": ((), []),
  "half": ((4, 2), ["a"]),
}


def values_at(step: int) -> dict[str, np.ndarray]:
  kinds = {"scalar": "int32", "half": "bfloat16"}
  sizes = {name: int(np.prod(shape)) for name, (shape, _) in LAYOUTS.items()}
  return {
    name: (np.arange(sizes[name]).reshape(shape) + step).astype(jax.numpy.dtype(kinds.get(name, "float32")))
    for name, (shape, _) in LAYOUTS.items()
  }


def on_mesh(values: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  found = {}
  for name, x in values.items():
    axes = [tuple(axis) if isinstance(axis, list) else axis for axis in LAYOUTS[name][1]]
    layout = NamedSharding(mesh, PartitionSpec(*axes))
    found[name] = jax.make_array_from_callback(x.shape, layout, lambda index, x=x: x[index])
  return found


def join(address: str, index: str) -> tuple[Mesh, list[int]]:
  """Joins the other process. Returns the mesh, and the steps that this process writes itself, when it does."""
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(address, 2, int(index))
  # On a machine with much else to do.
  saving._BEFORE_SAVE, saving._AT_END, idle_saver._POLICY = 200.0, 200.0, os.SCHED_OTHER
  here: list[int] = []
  write = OrbaxWriter.write
  OrbaxWriter.write = lambda self, step, *rest: (here.append(step), write(self, step, *rest))[1]
  return Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b")), here


def saves_often(address: str, index: str, folder: str) -> None:
  """Saves a second time while the processes beside it rest, and have only begun."""
  mesh, here = join(address, index)
  idle_saver._REST = 600.0
  checkpoints = Checkpoints(folder)
  for step in (2, 4, 5):
    checkpoints.save(step, on_mesh(values_at(step), mesh), {"place": step}, steps_follow=True)
  checkpoints.close()
  assert here == [4, 5] and checkpoints._steps == [2, 4, 5]


def is_left_alone(address: str, index: str, folder: str) -> None:
  """Saves steps 1 to 4. The process beside the second one is killed before step 3, which is given up."""
  mesh, here = join(address, index)
  idle_saver._REST = 0.001
  spoil = jax.jit(lambda state: jax.tree.map(lambda x: x * 0, state), donate_argnums=0)
  checkpoints = Checkpoints(folder)
  checkpoints.prepare(on_mesh(values_at(0), mesh))
  for step in (1, 2, 3, 4):
    state = on_mesh(values_at(step), mesh)
    if step == 2:
      idle_saver._REST = 60.0  # it comes no further before it is waited for
    if step == 3:
      idle_saver._REST = 0.001
      if index == "1":
        checkpoints._saves._saver._process.kill()
    checkpoints.save(step, state, {"place": step}, steps_follow=True)
    jax.block_until_ready(spoil(state))
    if step < 3:
      assert checkpoints.is_saving
      checkpoints.wait()
      assert not checkpoints.is_saving and here == []
      assert sorted(os.listdir(folder)) == [str(s) for s in range(1, step + 1)]
    while step == 3 and index == "1" and checkpoints.is_saving:
      time.sleep(0.01)  # until it knows, or the other one would wait for both
  assert here == [4] and checkpoints._steps == [1, 2, 4]
  checkpoints.wait()
  assert sorted(os.listdir(folder)) == ["2", "4"]  # nothing of the third
  expected = on_mesh(values_at(4), mesh)
  found, extra = checkpoints.restore(expected, {name: x.sharding for name, x in expected.items()})
  assert extra == {"place": 4}
  for name, x in expected.items():
    for one, other in zip(found[name].addressable_shards, x.addressable_shards, strict=True):
      np.testing.assert_array_equal(one.data, other.data)
  checkpoints.close()
  bad = values_at(4)["rows"]
  bad[5, 3] = np.inf  # which only the second process has
  trees = {"good": expected, "bad": expected | on_mesh({"rows": bad}, mesh)}
  assert digests.with_bad_numbers(trees) == (["bad"] if index == "1" else [])  # each says what it has
  assert checkpoints._saves._saver._process.returncode == -signal.SIGKILL


def has_others(address: str, index: str, folder: str) -> None:
  """Saves numbers of 64 bits beside, and what is not on a mesh itself. One reads them as they were."""
  mesh, here = join(address, index)
  idle_saver._REST = 0.001
  jax.config.update("jax_enable_x64", True)
  layout = NamedSharding(mesh, PartitionSpec("a"))
  wide = {"n": np.arange(6) + 2**40, "x": np.arange(4.0) + 1e-12}
  wide = {
    name: jax.make_array_from_callback(x.shape, layout, lambda i, x=x: x[i]) for name, x in wide.items()
  }
  mixed = {"w": wide["n"], "here": np.arange(3)}
  for step, state in ((4, wide), (5, mixed)):
    checkpoints = Checkpoints(f"{folder}_{step}")
    checkpoints.save(step, state, {}, steps_follow=True)
    checkpoints.wait()
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in state.items()}
    layouts = {
      name: getattr(x, "sharding", NamedSharding(mesh, PartitionSpec())) for name, x in state.items()
    }
    found, _ = checkpoints.restore(shapes, layouts)
    for name, x in state.items():
      equal = jax.jit(lambda a, b: (a == b).all())(found[name], x)
      assert bool(equal) and found[name].dtype == x.dtype
    checkpoints.close()
  assert here == [5]
  checkpoints = Checkpoints(folder)  # for the test
  for step in (4, 5):
    checkpoints.save(step, on_mesh(values_at(step), mesh), {"place": step})
  checkpoints.close()


def is_spoilt(address: str, index: str, folder: str) -> None:
  """Trains. The second update spoils numbers that only the second process has, and both say so."""
  join(address, index)
  idle_saver._REST = 0.001

  def compiled(*args):
    steps = compile_steps(*args)

    def train(state, batch):
      state, metrics = steps.train(state, batch)
      return (
        state._replace(params=jax.tree.map(spoilt, state.params)) if state.step == 2 else state
      ), metrics

    return steps._replace(train=train)

  def spoilt(x):
    if x.is_fully_replicated or index == "0":
      return x
    shards = [jax.device_put(np.asarray(shard.data) * np.nan, shard.device) for shard in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, shards)

  loop.compile_steps = compiled
  config = tiny.change(
    tiny.CONFIG, num_layers=1, num_steps=4, checkpoint_every=1, mesh=MeshConfig(data=1, expert=4)
  )
  with pytest.raises(
    NonFiniteLoss, match=r"has parameters nan at step 3; the checkpoint of step 1 in .* is good"
  ):
    loop.Run(config, load_dataset(config.data), folder).train()
  assert sorted(os.listdir(f"{folder}/checkpoints")) == ["1"]


def test_numbers_that_one_process_has_stop_both(tmp_path):
  run_two(
    "import sys; from tests.cluster import test_saves_beside as t; t.is_spoilt(*sys.argv[1:])",
    tmp_path / "run",
  )


@pytest.mark.parametrize(
  ("scenario", "steps"), [("is_left_alone", (4, 2)), ("saves_often", (5, 4)), ("has_others", (5, 4))]
)
def test_two_processes_have_their_checkpoints_written_by_two_others(tmp_path, scenario, steps):
  folder = tmp_path / "run"
  run_two(
    f"import sys; from tests.cluster import test_saves_beside as t; t.{scenario}(*sys.argv[1:])", folder
  )

  mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("b", "a"))  # another one
  for step in steps:
    expected = values_at(step)
    layouts = {name: x.sharding for name, x in on_mesh(expected, mesh).items()}
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in expected.items()}
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
      found, extra = checkpoints.restore(shapes, layouts)  # compares digests
    assert extra == {"place": step}
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    kept = json.loads((folder / f"{step}/extra/metadata").read_text())["arrays"]
    assert kept == digests.array_digests(expected)
    (folder / str(step)).rename(tmp_path / str(step))


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_digest_of_an_array_is_the_sum_of_those_of_its_shards(name):
  """Of replicas, one counts. The mesh has devices of one process, which has all parts."""
  mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))
  x = on_mesh(values_at(5), mesh)[name]
  assert digests.own_part(x) == int(digests.digest(x)) == int(digests._digest_on_devices(x))


@pytest.mark.parametrize("kind", ["bool", "int4", "uint4", "int2", "float4_e2m1fn", "float8_e4m3fn", "int16"])
def test_the_digest_of_numbers_of_few_bits_is_the_same_on_devices(kind):
  x = jax.numpy.array([[0, 1, -1, 1], [-1, 0, 0, 1], [1, 1, -0.0, -1]]).astype(kind)
  assert digests.own_part(x) == int(digests.digest(x)) == int(digests._digest_on_devices(x))
  assert int(digests.digest(x)) != int(digests.digest(x[::-1]))
