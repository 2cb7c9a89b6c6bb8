"""Saves in the background: what they save, and that one that fails ends all processes at once, with one line."""

import errno
import resource
import threading
import time
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import disk
from moe_jax.errors import InputError
from moe_jax.training import background, saving
from moe_jax.training.checkpoint import Checkpoints
from moe_jax.training.orbax_writer import OrbaxWriter

STATE = {"w": jnp.arange(3000.0), "b": jnp.zeros(3)}


@pytest.fixture
def told(monkeypatch):
  """(line, status) with which all processes would have ended."""
  found = []
  monkeypatch.setattr(background.watch, "stop_all", lambda line, status, trace: found.append((line, status)))
  return found


def test_orbax_comes_to_its_barrier_with_the_exception(told, tmp_path, capfd):
  """What `barrier` relies on. A process that is alone gets the exception itself, and nothing is printed."""
  checkpoints = Checkpoints(tmp_path / "run")
  checkpoints.save(1, STATE, {})
  checkpoints.wait()
  assert told == []
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
  try:
    with pytest.raises((OSError, ValueError), match=r"File too large|EFBIG"):
      checkpoints.save(2, STATE, {})
      checkpoints.wait()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  assert told and {status for _, status in told} == {2}
  assert told[0][0].startswith(f"{tmp_path}/run: no space left to write (")
  out, err = capfd.readouterr()
  assert "Traceback" not in out + err


@pytest.mark.parametrize(
  ("error", "line", "status"),
  [
    (OSError(errno.ENOSPC, "No space left on device"), "runs/a: no space left to write", 2),
    (KeyError("x"), "runs/a: a save failed: KeyError: 'x'", 1),
  ],
)
def test_a_barrier_on_the_way_up_ends_all(told, error, line, status):
  with pytest.raises(type(error)):
    try:
      raise error
    finally:
      background.barrier("runs/a", key="save", timeout_ms=1)
  assert [(told[0][0][: len(line)], told[0][1])] == [(line, status)]
  told.clear()
  background.barrier("runs/a", key="save", timeout_ms=1)
  assert told == []


def test_what_is_saved_is_what_was_there(tmp_path, monkeypatch):
  """The next step may reuse the arrays, before a byte is written: a save has its own."""
  go, write = threading.Event(), OrbaxWriter.write
  monkeypatch.setattr(OrbaxWriter, "write", lambda *args: (go.wait(60), write(*args))[1])
  state = {"w": jnp.arange(100_000.0), "n": jnp.int32(7)}
  expected = {name: np.array(x) for name, x in state.items()}
  checkpoints = Checkpoints(tmp_path / "run")
  checkpoints.save(1, state, {"place": 3})
  jax.block_until_ready(jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)(state))
  go.set()
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), expected)
  here = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), shapes)
  found, extra = checkpoints.restore(shapes, here)
  checkpoints.close()
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  assert extra == {"place": 3}
  copy = saving._host_copy(STATE)  # NumPy's view of an array keeps the next step from reusing it
  assert not np.shares_memory(copy["w"], np.asarray(STATE["w"]))


def test_a_save_holds_one_copy_of_the_state(tmp_path):
  """Orbax makes another one of NumPy arrays, in case somebody changes them."""
  state = {f"w{i}": jnp.full(2**18, i, jnp.float32) for i in range(32)}
  num_bytes = sum(x.nbytes for x in state.values())
  checkpoints = Checkpoints(tmp_path / "run")
  tracemalloc.start()
  try:
    checkpoints.save(1, state, {})
    checkpoints.wait()
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  checkpoints.close()
  assert num_bytes <= peak < 1.5 * num_bytes


def test_a_save_does_not_keep_the_loop(tmp_path, monkeypatch):
  """All but the copy is in a thread. After a save that failed, the next one is made, and then has its exception."""
  go, seen = threading.Event(), []

  def slow(self, step, state, extra, found):
    assert go.wait(60)
    seen.append(step)
    if step == 2:
      raise OSError("disk")

  monkeypatch.setattr(OrbaxWriter, "write", slow)
  checkpoints = Checkpoints(tmp_path / "run")
  assert not checkpoints.has_failed
  checkpoints.save(1, STATE, {})
  assert not seen and checkpoints.latest_step == 1
  go.set()
  checkpoints.save(2, STATE, {})
  deadline = time.monotonic() + 20
  while not checkpoints.has_failed and time.monotonic() < deadline:
    time.sleep(0.01)
  assert checkpoints.has_failed
  with pytest.raises(OSError, match="disk"):
    checkpoints.save(3, STATE, {})
  assert not checkpoints.has_failed
  checkpoints.close()  # what has been raised is not raised again
  assert seen == [1, 2, 3]


def test_a_save_after_one_that_failed_is_whole(tmp_path, monkeypatch):
  """With Orbax itself. What failed does not count as the latest."""
  checkpoints = Checkpoints(tmp_path / "run")
  checkpoints.save(1, STATE, {})
  checkpoints.wait()
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
  monkeypatch.setattr(background.watch, "stop_all", lambda *args, **kwargs: None)
  try:
    checkpoints.save(2, STATE, {})
    deadline = time.monotonic() + 20
    while not checkpoints.has_failed and time.monotonic() < deadline:
      time.sleep(0.01)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  with pytest.raises((OSError, ValueError), match=r"File too large|EFBIG"):
    checkpoints.save(3, STATE, {"place": 4})
  assert checkpoints.latest_step == 3
  checkpoints.close()
  assert Checkpoints(tmp_path / "run")._steps == [1, 3]


@pytest.mark.parametrize("step", [1, 2])
def test_what_a_failed_save_has_left_is_removed_without_a_word(tmp_path, caplog, step):
  left = tmp_path / f"run/{step}.orbax-checkpoint-tmp"
  left.mkdir(parents=True)
  checkpoints = Checkpoints(tmp_path / "run")
  with caplog.at_level("WARNING"):
    checkpoints.save(2, STATE, {})
    checkpoints.wait()
  checkpoints.close()
  assert not left.exists() and [p.name for p in (tmp_path / "run").iterdir()] == ["2"]
  assert [record for record in caplog.records if "orbax" in record.pathname] == []


def test_a_save_that_orbax_leaves_out_is_an_error(tmp_path, monkeypatch):
  checkpoints = Checkpoints(tmp_path / "run")
  checkpoints.save(2, STATE, {})
  checkpoints.wait()
  checkpoints._steps.clear()  # as if it had been moved away, and had come back
  checkpoints.save(2, STATE, {})
  with pytest.raises(InputError, match=r"run: step 2 was not saved, because Orbax finds it or a later step"):
    checkpoints.wait()
  checkpoints.close()


def test_files_that_go_with_a_checkpoint_are_on_disk_before_it(tmp_path, monkeypatch):
  lines, seen, sync = tmp_path / "metrics.jsonl", [], disk.sync
  lines.write_text("{}\n")
  written = lambda: sorted(path.name for path in tmp_path.glob("run/*"))
  monkeypatch.setattr(disk, "sync", lambda path: (seen.append((path, written())), sync(path)))
  checkpoints = Checkpoints(tmp_path / "run")
  checkpoints.save(1, STATE, {}, first=[lines])
  checkpoints.wait()
  assert seen == [(lines, [])] and written() == ["1"]
  lines.unlink()
  checkpoints.save(2, STATE, {}, first=[lines])
  with pytest.raises(FileNotFoundError):
    checkpoints.wait()
  assert written() == ["1"] and checkpoints.latest_step == 1
  checkpoints.close()
