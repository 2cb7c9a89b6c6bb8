"""Checkpoints that a process of its own writes: the same as others, and never lost with that process."""

import contextlib
import fcntl
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from moe_jax import locks
from moe_jax.errors import InputError
from moe_jax.training import digests, idle_saver
from moe_jax.training.checkpoint import Checkpoints
from moe_jax.training.saving import Alone
from moe_jax.training.shared_arrays import SharedArrays

POLICY = idle_saver._POLICY
pytestmark = pytest.mark.skipif(not idle_saver.AVAILABLE, reason="Linux only")


class State(NamedTuple):
  params: Any
  moments: Any
  nothing: Any
  hooks: tuple = ()


def state_of(start: float = 0.0) -> State:
  params = {
    "layers": {0: jnp.arange(6.0).reshape(2, 3) + start, 10: jnp.ones((3, 1), jnp.bfloat16)},
    "half": jnp.arange(5, dtype=jnp.bfloat16) + start,
  }
  moments = [optax.adam(1e-3).init(params["half"]), (jnp.array([True, False]), jnp.int32(start))]
  return State(params, moments, None)


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch):
  """Other tests run beside these, and would leave nothing to a process with the idle policy."""
  monkeypatch.setattr(idle_saver, "_REST", 0.001)
  monkeypatch.setattr(idle_saver, "_POLICY", os.SCHED_OTHER)


@pytest.fixture
def checkpoints(tmp_path):
  with contextlib.closing(Checkpoints(tmp_path / "run")) as found:
    yield found


@pytest.fixture
def here(monkeypatch):
  """The steps that this process wrote."""
  found, write = [], Alone._write_and_wait
  monkeypatch.setattr(
    Alone,
    "_write_and_wait",
    lambda self, step, *rest: (found.append(step), write(self, step, *rest))[1],
  )
  return found


def until(done, seconds: float = 120.0) -> None:
  deadline = time.monotonic() + seconds
  while not done():
    assert time.monotonic() < deadline
    time.sleep(0.02)


def restored(folder: pathlib.Path, state: State) -> tuple[State, Any]:
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
  layout = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), shapes)
  with contextlib.closing(Checkpoints(folder)) as found:
    return found.restore(shapes, layout)


def assert_holds(folder: pathlib.Path, state: State, extra: Any) -> None:
  found = restored(folder, state)
  assert jax.tree.structure(found[0]) == jax.tree.structure(state)
  jax.tree.map(np.testing.assert_array_equal, found[0], state)
  assert found[1] == extra


def test_the_process_writes_what_was_there_and_steps_go_on(checkpoints, here):
  """Three saves, of which two are kept. The arrays are donated to the next step as soon as `save` returns."""
  spoil = jax.jit(
    lambda s: jax.tree.map(lambda x: x ^ True if x.dtype == bool else x * 0 - 1, s), donate_argnums=0
  )
  for step in (1, 2, 3):
    checkpoints.save(step, state := state_of(step), {"place": step}, steps_follow=True)
    assert checkpoints.is_saving and checkpoints.latest_step == step
    jax.block_until_ready(spoil(state))
    until(lambda: not checkpoints.is_saving)
    assert not checkpoints.has_failed
  assert here == []
  checkpoints.save(4, state := state_of(4), {"place": 4})  # the last one is written here, from the same copy
  jax.block_until_ready(spoil(state))
  checkpoints.wait()
  assert here == [4]
  assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["3", "4"]
  assert_holds(checkpoints.folder, state_of(4), {"place": 4})
  os.rename(checkpoints.folder / "4", checkpoints.folder.parent / "4")
  assert_holds(checkpoints.folder, state_of(3), {"place": 3})


def test_a_save_that_must_be_there_is_written_here(checkpoints, here):
  """Nobody waits for a process that has only what others leave. From then on, it writes nothing."""
  checkpoints.save(1, state_of(1), {}, steps_follow=True)
  checkpoints.save(2, state_of(2), {"place": 2}, steps_follow=True)
  until(lambda: not checkpoints.is_saving)
  assert here == [1, 2]
  checkpoints.save(3, state_of(3), {"place": 3}, steps_follow=True)
  checkpoints.wait()
  assert here == [1, 2, 3]
  assert_holds(checkpoints.folder, state_of(3), {"place": 3})


def test_what_the_process_cannot_write_is_written_here(checkpoints, here, tmp_path):
  """It is killed while it rests, as by a system without memory."""
  checkpoints.save(1, state_of(1), {}, steps_follow=True)
  until(lambda: checkpoints._saves._saver._process)
  os.kill(checkpoints._saves._saver._process.pid, signal.SIGKILL)
  until(lambda: not checkpoints.is_saving)
  assert here == [1] and not checkpoints.has_failed
  assert_holds(checkpoints.folder, state_of(1), {})


def test_a_process_that_gets_nothing_of_the_cores_is_not_waited_for(checkpoints, here, monkeypatch):
  monkeypatch.setattr(idle_saver, "_REST", 0.5)
  monkeypatch.setattr(idle_saver, "_LATEST", 1.0)
  checkpoints.save(1, state_of(1), {"place": 1}, steps_follow=True)
  until(lambda: not checkpoints.is_saving)
  assert here == [1] and not checkpoints.has_failed
  assert_holds(checkpoints.folder, state_of(1), {"place": 1})


def test_the_error_of_a_folder_that_cannot_be_written_is_that_of_this_process(here, tmp_path):
  checkpoints = Checkpoints(tmp_path / "run")
  checkpoints.save(1, state_of(1), {}, steps_follow=True)
  until(lambda: not checkpoints.is_saving)
  checkpoints.folder.rename(checkpoints.folder.parent / "moved")
  checkpoints.folder.write_text("")
  checkpoints.save(2, state_of(2), {}, steps_follow=True)
  until(lambda: checkpoints.has_failed)
  with pytest.raises(InputError, match="run: is a file, and the folder of checkpoints should be there"):
    checkpoints.wait()
  assert here == [2] and checkpoints._saves._saver._process.returncode is not None
  checkpoints._saves._saver.close()


def test_a_process_that_starts_slowly_is_not_waited_for_and_takes_nothing_from_steps(
  checkpoints, here, monkeypatch, tmp_path
):
  """Python alone needs 30 ms of a core before it runs a line of ours."""
  slow = tmp_path / "python"
  slow.write_text("#!/bin/sh\nexec sleep 100\n")
  slow.chmod(0o755)
  monkeypatch.setattr(sys, "executable", str(slow))
  monkeypatch.setattr(idle_saver, "_POLICY", POLICY)
  checkpoints.save(1, state_of(1), {"place": 1}, steps_follow=True)
  until(lambda: checkpoints._saves._saver._process)
  process = checkpoints._saves._saver._process
  until(lambda: os.sched_getscheduler(process.pid) == os.SCHED_IDLE)
  before = time.monotonic()
  checkpoints.wait()
  assert time.monotonic() - before < 30 and process.returncode == -signal.SIGKILL
  assert here == [1]
  assert_holds(checkpoints.folder, state_of(1), {"place": 1})


@pytest.mark.parametrize("what", ["no process", "no memory", "another system"])
def test_a_system_without_it_has_a_thread(checkpoints, here, monkeypatch, what):
  if what == "no process":
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
  elif what == "no memory":
    monkeypatch.setattr(os, "memfd_create", lambda name: os.open("/nowhere", os.O_RDONLY))
  else:
    monkeypatch.setattr(idle_saver, "AVAILABLE", False)
  checkpoints.save(1, state_of(1), {"place": 1}, steps_follow=True)
  checkpoints.wait()
  assert here == [1]
  assert_holds(checkpoints.folder, state_of(1), {"place": 1})


def test_signals_to_all_processes_are_for_the_run(checkpoints, here, monkeypatch):
  """SLURM sends its signal to each process of a step."""
  assert POLICY == os.SCHED_IDLE
  monkeypatch.setattr(idle_saver, "_POLICY", os.SCHED_BATCH)
  checkpoints.save(1, state_of(1), {}, steps_follow=True)
  until(lambda: not checkpoints.is_saving)
  process = checkpoints._saves._saver._process
  assert os.sched_getscheduler(process.pid) == os.SCHED_BATCH  # which it was told
  assert os.getpgid(process.pid) != os.getpgid(0)  # the terminal's signals are for groups
  assert os.getsid(process.pid) == os.getsid(0)  # Linux shares cores out between sessions first
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    process.send_signal(number)
  checkpoints.save(2, state_of(2), {}, steps_follow=True)
  until(lambda: not checkpoints.is_saving)
  assert here == []
  checkpoints.close()
  assert process.returncode == -signal.SIGKILL


def test_it_imports_from_where_the_run_does_and_gets_nothing_that_is_for_the_run(monkeypatch):
  said = {}
  monkeypatch.setattr(sys, "path", ["", "/site", ""])
  monkeypatch.setattr(subprocess, "Popen", lambda *args, **more: said.update(more) or MagicMock())
  for name in ("JAX_TRANSFER_GUARD", "JAX_COORDINATOR_BIND_ADDRESS", "XLA_FLAGS"):
    monkeypatch.setenv(name, "of the run")
  idle_saver.start(pathlib.Path("run"), 2, MagicMock(handle=3, num_bytes=8), None)
  assert said["env"]["PYTHONPATH"] == f"{os.getcwd()}:/site"
  assert "of the run" not in said["env"].values() and said["env"]["JAX_PLATFORMS"] == "cpu"


def test_arrays_of_devices_are_copied_in_the_thread(monkeypatch):
  state = state_of(2)
  monkeypatch.setattr(digests, "in_host_memory", lambda x: False)
  shared = SharedArrays(state)
  copies = shared.copy(state)
  assert all(
    np.shares_memory(x, np.asarray(y)) for x, y in zip(copies, jax.tree.leaves(state), strict=True) if x.size
  )
  assert not any(x.any() for x in shared.parts)
  shared.fill(copies)
  assert not any(x is not None for x in copies)
  jax.tree.map(np.testing.assert_array_equal, shared.tree(), state)
  assert shared.tree().params["half"].dtype == ml_dtypes.bfloat16
  shared.close()


KILLED = """
import os, signal, sys, time
import jax.numpy as jnp
from moe_jax import locks
from moe_jax.errors import InputError
from moe_jax.training import idle_saver
from moe_jax.training.checkpoint import Checkpoints
idle_saver._REST, idle_saver._POLICY = 0.001, os.SCHED_OTHER
with locks.hold(sys.argv[1] + "/.lock", "the run"):
  checkpoints = Checkpoints(sys.argv[1] + "/checkpoints")
  checkpoints.save(1, {"w": jnp.ones(3)}, {}, steps_follow=True)
  while not checkpoints._saves._saver._process:
    time.sleep(0.01)
  if sys.argv[2] == "written":
    while checkpoints.is_saving:
      time.sleep(0.01)
  print(checkpoints._saves._saver._process.pid, flush=True)
  os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("when", ["starting", "written"])
def test_the_process_ends_with_a_run_that_is_killed(tmp_path, when):
  """Also where it rests, which is most of the time. The next owner of the run waits for that."""
  done = subprocess.run(
    [sys.executable, "-c", KILLED, tmp_path, when], capture_output=True, text=True, check=False, timeout=120
  )
  assert done.returncode == -signal.SIGKILL, done.stderr

  def is_gone():
    with contextlib.suppress(OSError):  # one that nobody has waited for is still listed
      return pathlib.Path(f"/proc/{done.stdout.strip()}/stat").read_text().split(") ")[1][0] == "Z"
    return True

  with locks.hold(tmp_path / ".lock", "the run"):
    until(is_gone, 20)
  if when == "written":
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_a_process_that_outlives_its_run_keeps_the_lock(checkpoints, tmp_path):
  with locks.hold(tmp_path / ".lock", "the run"):
    checkpoints.save(1, state_of(1), {}, steps_follow=True)
    until(lambda: checkpoints._saves._saver._process)
  with open(tmp_path / ".lock") as file:
    with pytest.raises(BlockingIOError):
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    checkpoints.close()
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
