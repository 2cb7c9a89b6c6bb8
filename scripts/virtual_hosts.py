"""Hosts of `soak_cluster.py`: network namespaces of Linux on one bridge, between which the network can be cut.

Not a command. The process that makes them runs inside `unshare --map-root-user --net --mount`, so nothing of the machine's own
network is touched, and all is gone with the process.
"""

import contextlib
import os
import pathlib
import socket
import subprocess
import time


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
