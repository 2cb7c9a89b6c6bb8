"""Who is there: process 0 calls the roll before JAX connects, and all listen for each other until the end.

JAX's own start-up ends a process that waits for one that never joins by an abort with a stack trace that does
not say who is missing; and a process that dies is noticed after its heartbeats have been missing for long, while
the others hang in a collective. So every process keeps a TCP connection with process 0, on the coordinator's own
address. A process that dies closes it at once; one that hangs, or whose machine is gone, stops saying
that it is there. Either way process 0 tells the others, and each ends with one line. Standard library only.
"""

import contextlib
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from moe_jax.errors import InputError

_HELLO = "moe_jax"
_LINGER = (
  5.0  # seconds in which the others may read why, before this process and with it their connection goes
)


class Roll(NamedTuple):
  """What every process must know before it can join."""

  address: str  # host:port of process 0
  num_processes: int
  process_id: int
  timeout: float  # seconds until all have joined
  heartbeat: float  # seconds without a sign after which a process counts as gone
  flags: str = ""  # digest of what must be the same in all processes


class _Peer:
  """The other end of one connection."""

  def __init__(self, connection: socket.socket, index: int, name: str):
    self.connection, self.index, self.name = connection, index, name
    self.heard, self.buffer, self.left = time.monotonic(), b"", False

  def send(self, **message: Any) -> None:
    with contextlib.suppress(OSError):  # a peer that is gone is noticed where it is read
      self.connection.sendall(json.dumps(message).encode() + b"\n")

  def messages(self) -> list[dict[str, Any]] | None:
    """What has arrived, which may be nothing yet; None at the end of the connection."""
    try:
      data = self.connection.recv(1 << 16)
    except (BlockingIOError, TimeoutError):
      return []
    except OSError:
      return None
    if not data:
      return None
    self.heard = time.monotonic()
    *lines, self.buffer = (self.buffer + data).split(b"\n")
    try:
      return [json.loads(line) for line in lines]
    except ValueError:  # another program
      return None


def split_address(address: str) -> tuple[str, int]:
  """(host, port). Raises `InputError` where there is no port."""
  host, _, port = address.rpartition(":")
  if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
    raise InputError(f"--coordinator_address={address}: must be HOST:PORT of process 0")
  return host.strip("[]"), int(port)


def join(roll: Roll, end: Callable[[str, int], None] | None = None) -> "Watch":
  """Waits until all have joined; from then on the process ends when another one is gone.

  Args:
    roll: who this is, and whom to wait for.
    end: (line, status) prints a line, if it is not empty, and ends the process if the status is not negative.

  Raises:
    InputError: not all have joined in time, and who is missing; or what a process was started with differs.
  """
  watch = Watch(_call(roll) if roll.process_id == 0 else [_answer(roll)], roll, end)
  watch.start()
  return watch


def is_loopback(host: str) -> bool:
  """Whether only processes of this machine can reach `host`."""
  return host in ("localhost", "::1") or host.startswith("127.")


def _listen(roll: Roll) -> socket.socket:
  host, port = split_address(roll.address)
  try:
    return socket.create_server((host if is_loopback(host) else "", port), backlog=1024)
  except OSError as error:
    raise InputError(
      f"--coordinator_address={roll.address}: process 0 cannot listen there ({error.strerror}); choose a free "
      "port of the machine on which process 0 runs"
    ) from None


def _call(roll: Roll) -> list[_Peer]:
  """Process 0: the connections of all others."""
  deadline = time.monotonic() + roll.timeout
  peers: dict[int, _Peer] = {}
  with _listen(roll) as listener:
    while len(peers) < roll.num_processes - 1:
      listener.settimeout(max(deadline - time.monotonic(), 0.001))
      try:
        connection, (host, *_) = listener.accept()
        connection.settimeout(max(min(deadline - time.monotonic(), 10.0), 0.001))
        hello = json.loads(connection.makefile("rb").readline(4096))
        index = hello[_HELLO]
      except TimeoutError:
        if time.monotonic() < deadline:
          continue  # someone connected and said nothing
        _refuse(peers, _missing(roll, peers))
      except (OSError, ValueError, TypeError, KeyError):
        continue  # no process of ours
      peer = _Peer(connection, index, f"{hello['host']}, pid {hello['pid']}")
      wrong = _wrong(roll, peers, hello, host)
      if wrong:
        _refuse(peers | {-1: peer}, wrong)
      peers[index] = peer
  for peer in peers.values():
    peer.send(go=True)
  return [peers[i] for i in sorted(peers)]


def _missing(roll: Roll, peers: dict[int, _Peer]) -> str:
  absent = [i for i in range(1, roll.num_processes) if i not in peers]
  shown = ", ".join(map(str, absent[:8])) + (f" and {len(absent) - 8} more" if len(absent) > 8 else "")
  return (
    f"--num_processes={roll.num_processes}: process{'es' * (len(absent) > 1)} {shown} did not join at "
    f"{roll.address} within {roll.timeout:g} s (--initialization_timeout)"
  )


def _wrong(roll: Roll, peers: dict[int, _Peer], hello: dict[str, Any], host: str) -> str:
  """What does not fit in a newcomer; empty if all fits."""
  index, who = hello[_HELLO], f"the process on {hello['host']} ({host}), pid {hello['pid']},"
  if hello["num_processes"] != roll.num_processes:
    return f"--num_processes={hello['num_processes']}: {who} was given that, process 0 {roll.num_processes}"
  if not 0 < index < roll.num_processes or index in peers:
    other = f"; {peers[index].name} has it already" if index in peers else ""
    return f"--process_id={index}: {who} was given that{other}; each of 0 to {roll.num_processes - 1} once"
  if hello["flags"] != roll.flags:
    return f"process {index}: {who} was started with other flags than process 0; all must have the same"
  return ""


def _refuse(peers: dict[int, _Peer], why: str) -> NoReturn:
  for peer in peers.values():
    peer.send(stop=why)
  for peer in peers.values():
    peer.connection.close()
  raise InputError(why)


def _answer(roll: Roll) -> _Peer:
  """Every other process: the connection with process 0, once all have joined."""
  deadline = time.monotonic() + roll.timeout
  hello = {
    _HELLO: roll.process_id,
    "num_processes": roll.num_processes,
    "host": socket.gethostname(),
    "pid": os.getpid(),
    "flags": roll.flags,
  }
  absent = InputError(
    f"--coordinator_address={roll.address}: process 0 was not there within {roll.timeout:g} s "
    f"(--initialization_timeout), says process {roll.process_id} of {roll.num_processes}"
  )
  while time.monotonic() < deadline:
    try:
      connection = socket.create_connection(split_address(roll.address), timeout=2.0)
    except OSError:  # not there yet, or its name is not known yet
      time.sleep(min(0.2, max(deadline - time.monotonic(), 0.0)))
      continue
    peer = _Peer(connection, 0, "the coordinator")
    peer.send(**hello)
    # Process 0 waits as long for the others, and says who is missing.
    while time.monotonic() < deadline + _LINGER:
      connection.settimeout(max(deadline + _LINGER - time.monotonic(), 0.001))
      messages = peer.messages()
      if messages is None:
        break  # process 0 ended, or another program has that port
      for message in messages:
        if "stop" in message:
          raise InputError(message["stop"])
        return peer
    connection.close()
    time.sleep(0.2)
  raise absent


class Watch:
  """Listens for the others in a thread until `leave`. Ends this process when one of them is gone."""

  def __init__(self, peers: list[_Peer], roll: Roll, end: Callable[[str, int], None] | None = None):
    self._peers, self._roll = peers, roll
    self._end = end or _end
    self._lock = threading.Lock()  # one reason to stop is enough
    self._stopping = self._leaving = False
    for peer in peers:
      peer.connection.settimeout(_LINGER)
      peer.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

  def start(self) -> None:
    selector = selectors.DefaultSelector()
    for peer in self._peers:
      selector.register(peer.connection, selectors.EVENT_READ, peer)
    threading.Thread(target=self._listen, args=(selector,), name="moe_jax-watch", daemon=True).start()

  def leave(self) -> None:
    """The end that was planned: the others may go too."""
    self._leaving = True
    for peer in self._peers:
      peer.send(bye=True)

  def stop(self, line: str, status: int) -> NoReturn:
    """Ends this process with `status`, and the others with one line. The caller has printed its own."""
    self._stop(line, status, own=True)
    while True:  # another reason came first: its thread ends the process
      time.sleep(1.0)

  def _stop(self, line: str, status: int, own: bool = False, source: int | None = None) -> None:
    with self._lock:
      if self._stopping:
        return
      self._stopping = True
    me = self._roll.process_id
    told = (
      f"process {me} of {self._roll.num_processes} ({socket.gethostname()}) stopped: {line}" if own else line
    )
    self._end("" if own else line, -1)  # says it
    for peer in self._peers:
      if peer.index != source:
        peer.send(stop=told, status=status)
    if own or me == 0:
      self._linger(source)
    self._end("", status)

  def _linger(self, source: int | None) -> None:
    """Waits until the others have gone, for the connections of JAX end with this process too."""
    deadline = time.monotonic() + _LINGER
    for peer in self._peers:
      with contextlib.suppress(OSError):
        while peer.index != source and time.monotonic() < deadline:
          peer.connection.settimeout(max(deadline - time.monotonic(), 0.001))
          if peer.messages() is None:
            break

  def _listen(self, selector: selectors.BaseSelector) -> None:
    beat = self._roll.heartbeat / 4
    next_beat = awake = time.monotonic()
    while selector.get_map() and not self._stopping:
      if time.monotonic() >= next_beat:
        next_beat = time.monotonic() + beat
        for peer in self._peers:
          peer.send()
      for key, _ in selector.select(max(next_beat - time.monotonic(), 0.0)):
        if not self._read(key.data):
          selector.unregister(key.fileobj)
      slept, awake = time.monotonic() - awake > 2 * beat, time.monotonic()
      if slept:  # this process was stopped for a while: it cannot tell who was silent
        for peer in self._peers:
          peer.heard = awake
      silent = [p for p in self._peers if not p.left and time.monotonic() - p.heard > self._roll.heartbeat]
      for peer in silent[:1]:
        self._gone(peer, f"has given no sign for {self._roll.heartbeat:g} s (--heartbeat_timeout)")

  def _read(self, peer: _Peer) -> bool:
    """False at the end of the connection."""
    messages = peer.messages()
    if messages is None:
      if not (peer.left or self._leaving):
        self._gone(peer, "died or was killed")
      peer.left = True
      return False
    for message in messages:
      if "bye" in message:
        peer.left = True
      elif "stop" in message:
        self._stop(message["stop"], message["status"], source=peer.index)
    return True

  def _gone(self, peer: _Peer, what: str) -> None:
    self._stop(
      f"process {peer.index} of {self._roll.num_processes} ({peer.name}) {what}; all processes stop, and the same "
      "command continues from the last checkpoint",
      1,
      source=peer.index,
    )


def _end(line: str, status: int) -> None:
  """Prints `line`, if there is one; ends the process if `status` is 0 or more, whatever its threads wait for."""
  if line:
    os.write(2, f"error: {line}\n".encode())
  if status >= 0:
    for stream in (sys.stdout, sys.stderr):
      with contextlib.suppress(Exception):
        stream.flush()
    os._exit(status)
