"""A start of a run that `soak.py` disturbs, what a user does after one that is refused, and what is left of a run."""

import contextlib
import os
import pathlib
import re
import resource
import signal
import sys
import time
import traceback
import warnings

from tensorboardX.proto.event_pb2 import Event

from moe_jax import cli
from moe_jax.comparison.comparison import Comparison
from moe_jax.config import Config
from moe_jax.errors import STOPPED_STATUS, InputError
from moe_jax.training import idle_saver
from moe_jax.training.checkpoint import Checkpoints
from moe_jax.training.metric_writer import EVENTS
from moe_jax.training.router_trace import Trace

ARM = "arm"
LIMIT = 300.0  # seconds that a start may take


class Failed(Exception):
  """Something was lost, or silently wrong."""


def save_beside() -> None:
  """Makes runs of this process wait at each save, so that the process beside them writes it, and in less time."""
  save = Checkpoints.save

  def save_and_wait(self, *args, **more) -> None:
    save(self, *args, **more)
    while self.is_saving:
      time.sleep(0.005)

  Checkpoints.save, idle_saver._REST, idle_saver._POLICY = save_and_wait, 0.001, os.SCHED_OTHER


class Start:
  """A process that trains, as the scripts do. Forked from this one, in which JAX is imported and has not started."""

  def __init__(
    self, config: Config, output_dir: pathlib.Path, log: pathlib.Path, largest_file: int, beside: bool
  ):
    self.status: int | None = None
    self.log = (
      log  # a file of its own: `largest_file` is the limit of every file, and many starts would reach it
    )
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # JAX warns of forks
      self.pid = os.fork()
    if self.pid:
      return
    status = 1
    try:
      out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
      os.dup2(out, 1)
      os.dup2(out, 2)
      if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
      if beside:
        save_beside()
      with cli.one_line():
        Comparison({ARM: {}}, [0], config, output_dir).run()
      status = 0
    except SystemExit as error:
      status = error.code
      if status not in (0, 2, STOPPED_STATUS, 130):  # not ours: say whose
        os.write(2, traceback.format_exc().encode())
    except BaseException:
      os.write(2, traceback.format_exc().encode(errors="replace"))
    finally:
      with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
      os._exit(status)

  def poll(self) -> int | None:
    """The exit status, negative for a signal; None while it runs."""
    if self.status is None:
      pid, status = os.waitpid(self.pid, os.WNOHANG)
      self.status = os.waitstatus_to_exitcode(status) if pid else None
    return self.status

  def wait(self) -> int:
    deadline = time.monotonic() + LIMIT
    while self.poll() is None:
      if time.monotonic() > deadline:
        self.kill()
        raise Failed("a start hangs")
      time.sleep(0.01)
    return self.status

  def send_signal(self, number: int) -> None:
    if self.poll() is None:
      os.kill(self.pid, number)

  def kill(self) -> None:
    self.send_signal(signal.SIGKILL)
    while self.poll() is None:
      time.sleep(0.01)


def remedy(said: str) -> pathlib.Path | None:
  """Does what a user does after a start was refused for a damaged file: empties or removes the one that the line names.

  An empty configuration is moved aside by the next start, which writes it from the flags; a result is made again.

  Returns:
    The file; None if the line says that there is nothing to do.

  Raises:
    Failed: the line names no such file.
  """
  line = next((line for line in said.splitlines() if line.startswith("error: ")), "")
  if "the same command now begins anew" in line:
    return None
  if named := re.match(r"error: (?:--output_dir=)?(.+?): holds a run ", line):
    path = pathlib.Path(named[1]) / "config.json"
    path.write_bytes(b"")
    return path
  if named := re.match(r"error: --output_dir=(.+?): holds results on other text", line):
    path = pathlib.Path(named[1]) / "arms" / ARM / "seed_0/result.json"
    path.unlink()
    return path
  raise Failed(f"a start was refused, and no file is named: {said[-3000:]}")


def move_events(folder: pathlib.Path, seconds: int) -> None:
  """Renames event files as if the clock had been so many seconds ahead when they were written."""
  for path in sorted(folder.rglob(f"{EVENTS}*"), reverse=seconds > 0):
    second, _, rest = path.name.removeprefix(EVENTS).partition(".")
    path.rename(path.with_name(f"{EVENTS}{int(second) + seconds:010d}.{rest}"))


def shown_events(folder: pathlib.Path) -> dict[tuple[str, int], bytes]:
  """(tag, step) -> value, as TensorBoard reads a folder: files in the order of their names, of each the whole records,
  and where a run goes on, what was there of later steps is forgotten."""
  shown: dict[tuple[str, int], bytes] = {}
  for path in sorted(folder.glob(f"{EVENTS}*")):
    data, at = path.read_bytes(), 0
    while at + 12 < len(data):  # a length of 8 bytes, its checksum of 4, the event, its checksum
      end = at + 12 + int.from_bytes(data[at : at + 8], "little")
      if end + 4 > len(data):
        break
      event = Event.FromString(data[at + 12 : end])
      if event.HasField("session_log"):
        shown = {(tag, step): value for (tag, step), value in shown.items() if step < event.step}
      for value in event.summary.value:
        if value.tag != "tokens_per_second":
          shown[value.tag, event.step] = value.SerializeToString()
      at = end + 4
  return shown


def recorded(folder: pathlib.Path) -> list[bytes]:
  """Returns the bytes of all recorded steps of a run, of which none may be missing."""
  try:
    trace = Trace(folder)
    found = trace.read(0, len(trace))
  except InputError as error:
    raise Failed(str(error)) from None
  if trace.missing:
    raise Failed(f"{folder}: {trace.missing}")
  return [x.tobytes() for x in found]
