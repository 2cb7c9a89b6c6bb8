"""Hosts of `soak_cluster.py`, and processes on them: network namespaces of Linux on a bridge, which can be cut off.

Not a command. The process that makes them runs inside `unshare --map-root-user --net --mount`, so nothing of the machine's own
network is touched, and all is gone with the process.
"""

import contextlib
import os
import pathlib
import random
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NoReturn

ROOT = pathlib.Path(__file__).resolve().parents[1]
HEARTBEAT = 10  # --heartbeat_timeout
BOUND = 1.25 * HEARTBEAT + 6  # seconds, docs/reliability.md
SLOW = 30.0  # seconds more on a machine with much else to do
_BESIDE = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT / "scripts")!r})
from soak_start import save_beside
save_beside()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Hosts:
  """Network namespaces with one address each, on a bridge. Only inside `unshare --net --mount`."""

  def __init__(self, count: int):
    _ip("link set lo up")
    self._stack = contextlib.ExitStack()
    for bridge in ("bridge0", "bridge1"):
      _ip(f"link add {bridge} type bridge")
      _ip(f"link set {bridge} up")
      self._stack.callback(_ip, f"link del {bridge}")
    self._pids = [self._make(i) for i in range(count)]
    self.address = "10.99.0.1"

  def _make(self, i: int) -> int:
    process = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
    self._stack.callback(process.wait)
    self._stack.callback(process.kill)
    own = os.readlink("/proc/self/ns/net")
    while os.readlink(f"/proc/{process.pid}/ns/net") == own:
      time.sleep(0.01)
    _ip(f"link add port{i} type veth peer name eth0 netns {process.pid}")
    _ip(f"link set port{i} master bridge0 up")
    for command in ("link set lo up", f"addr add 10.99.0.{i + 1}/24 dev eth0", "link set eth0 up"):
      _ip(command, ["nsenter", f"--target={process.pid}", "--net"])
    return process.pid

  def command(self, i: int, hosts_file: pathlib.Path) -> list[str]:
    """What runs a program on host `i`. Gloo listens at the address of the host's name."""
    hosts_file.write_text(f"127.0.0.1 localhost\n10.99.0.{i + 1} {socket.gethostname()}\n")
    bind = 'mount --bind "$0" /etc/hosts && exec "$@"'
    enter = ["nsenter", f"--target={self._pids[i]}", "--net", "unshare", "--mount"]
    return [*enter, "sh", "-c", bind, str(hosts_file)]

  def cut_off(self, which: list[int]) -> None:
    """Puts these hosts on a bridge of their own: nobody is told."""
    for i in which:
      _ip(f"link set port{i} master bridge1")

  def heal(self) -> None:
    for i in range(len(self._pids)):
      _ip(f"link set port{i} master bridge0")

  def close(self) -> None:
    self._stack.close()


def _ip(command: str, before: list[str] | None = None) -> None:
  subprocess.run([*(before or []), "ip", *command.split()], check=True)


class Failed(Exception):
  """Something was lost, silently wrong, or took too long."""


class Times:
  """How long it took until all processes had ended, against the time that docs/reliability.md states."""

  def __init__(self):
    self._all, self._late = 0, []

  def note(self, name: str, seconds: float) -> str:
    """Returns the seconds as the table has them.

    Raises:
      Failed: it took longer than a busy machine explains.
    """
    if seconds > BOUND + SLOW:
      raise Failed(f"{name}: {seconds:.1f} s until all had ended; {BOUND:g} s are stated")
    self._all += 1
    if seconds <= BOUND:
      return f"{seconds:.1f}"
    self._late.append(name)
    return f"{seconds:.1f}, above {BOUND:g}"

  def summary(self) -> str:
    late = f": {', '.join(self._late)}" if self._late else ""
    return f"above the stated {BOUND:g} s: {len(self._late)} of {self._all} times{late}"


class TooSlow(Exception):
  """A process was so late that JAX did not wait for it. That is of the machine, not of the run."""


class Cluster:
  """The processes of one start of experiments/load_balancing.py.

  Args:
    count: how many; 1: without --coordinator_address.
    output_dir: of the run. Outputs of the processes go to files beside the folder that it is in.
    hosts: None: all on the loopback interface.
    arguments: of the command, without those of the processes.
    devices: of all processes together.
    largest: the largest file that a process may write, in bytes.
    beside: whether processes wait at each save until those beside them have written it.
  """

  def __init__(
    self,
    count: int,
    output_dir: pathlib.Path,
    hosts: Hosts | None,
    arguments: list[str],
    devices: int,
    largest: dict[int, int],
    beside: bool,
  ):
    address = "127.0.0.1"
    if hosts and count > 1:
      address = hosts.address
    port = 20_000 + random.randrange(10_000) if hosts else _free_port()
    place = [f"--coordinator_address={address}:{port}", f"--num_processes={count}"]
    environment = os.environ | {
      "PYTHONPATH": str(ROOT),
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices // count}",
      "JAX_COMPILATION_CACHE_DIR": str(output_dir.parent.parent / "compiled"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    self.count, self.processes, self.readers, self.logs = count, [], [], []
    for i in range(count):
      # Not in the folder of the run, whose disk may be full.
      log = output_dir.parent.parent / f"{output_dir.parent.name}_{output_dir.name}_{i}.txt"
      own = hosts.command(i, output_dir.parent / f"hosts_{i}") if hosts else []
      joins = [*place, f"--process_id={i}"] if count > 1 else ["--num_processes=1"]
      # Through a pipe: what the process says is not limited.
      with log.open("w") as out:
        reader = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=out)
      with reader.stdin as pipe:
        self.processes.append(
          subprocess.Popen(
            [
              *own,
              sys.executable,
              *(["-c", _BESIDE] if beside else []),
              str(ROOT / "experiments/load_balancing.py"),
              *arguments,
              f"--output_dir={output_dir}",
              *joins,
            ],
            stdout=pipe,
            stderr=pipe,
            env=environment,
            preexec_fn=_limit(largest.get(i, 0)),
          )
        )
      self.readers.append(reader)
      self.logs.append(log)

  def send(self, i: int, number: int) -> None:
    self.processes[i].send_signal(number)

  def running(self) -> list[int]:
    return [i for i, process in enumerate(self.processes) if process.poll() is None]

  def wait(self, seconds: float, but: int = -1) -> list[int | None]:
    """Returns the exit statuses when all processes have ended, except `but`."""
    deadline = time.monotonic() + seconds
    while any(i != but for i in self.running()):
      if time.monotonic() > deadline:
        raise Failed(f"processes {self.running()} have not ended after {seconds:g} s: {self.said()}")
      time.sleep(0.05)
    for i, reader in enumerate(self.readers):
      if i != but:
        reader.wait()
    return [process.poll() for process in self.processes]

  def said(self) -> list[str]:
    return [log.read_text(errors="replace")[-1500:] for log in self.logs]

  def fail(self, what: str) -> NoReturn:
    if any("Gloo context initialization failed" in text for text in self.said()):  # after 30 s
      raise TooSlow
    raise Failed(f"{what}: {self.said()}")

  def kill(self) -> None:
    for i in self.running():
      self.processes[i].kill()
      self.processes[i].wait()


def _free_port() -> int:
  with socket.create_server(("127.0.0.1", 0)) as server:
    return server.getsockname()[1]


def _limit(largest: int) -> Callable[[], None] | None:
  if not largest:
    return None
  return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
