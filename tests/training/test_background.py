"""A save that fails in the background ends all processes at once, with one line."""

import errno
import resource

import jax.numpy as jnp
import pytest

from moe_jax.training import background
from moe_jax.training.checkpoint import Checkpoints

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
  assert told[0][0].startswith("the run: no space left to write (")
  out, err = capfd.readouterr()
  assert "Traceback" not in out + err


@pytest.mark.parametrize(
  ("error", "line", "status"),
  [
    (OSError(errno.ENOSPC, "No space left on device"), "the run: no space left to write", 2),
    (KeyError("x"), "a save failed: KeyError: 'x'", 1),
  ],
)
def test_a_barrier_on_the_way_up_ends_all(told, error, line, status):
  with pytest.raises(type(error)):
    try:
      raise error
    finally:
      background.barrier(key="save", timeout_ms=1)
  assert [(told[0][0][: len(line)], told[0][1])] == [(line, status)]
  told.clear()
  background.barrier(key="save", timeout_ms=1)
  assert told == []
