"""Start-up of processes without a real cluster: which process this is, which have joined, and which rows it reads."""

import socket
import threading
import time
from typing import NamedTuple

import jax
import numpy as np
import pytest

from moe_jax.cluster import processes, roll_call
from moe_jax.cluster.start import Options, Placement, find_placement
from moe_jax.errors import InputError

SLURM = {
  "SLURM_JOB_ID": "4097",
  "SLURM_STEP_NODELIST": "gpu[07-08]",
  "SLURM_NTASKS": "4",
  "SLURM_PROCID": "3",
  "SLURM_LOCALID": "1",
  "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
OMPI = {
  "OMPI_COMM_WORLD_SIZE": "4",
  "OMPI_COMM_WORLD_RANK": "3",
  "OMPI_COMM_WORLD_LOCAL_RANK": "1",
  "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
ORTE = OMPI | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}


@pytest.mark.parametrize(
  ("options", "environment", "expected"),
  [
    ({}, {}, None),
    ({"num_processes": 1}, SLURM, None),
    ({}, SLURM | {"SLURM_NTASKS": "1"}, None),
    (
      {},
      {k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"},
      None,
    ),  # sbatch's script, without srun
    (
      {"coordinator_address": "a:1", "num_processes": 2, "process_id": 1},
      {},
      Placement("a:1", 2, 1),
    ),
    ({}, SLURM, Placement("gpu07:61441", 4, 3, (1,))),  # 61440 + 4097 % 4096
    (
      {},
      SLURM | {"CUDA_VISIBLE_DEVICES": "1"},
      Placement("gpu07:61441", 4, 3, None),
    ),  # bound by SLURM already
    ({}, SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x4)"}, Placement("gpu07:61441", 4, 3, None)),
    ({"coordinator_address": "b:9"}, SLURM, Placement("b:9", 4, 3, (1,))),
    ({}, ORTE, Placement("10.96.0.1:62624", 4, 3, (1,))),  # 61440 + 1531576320 / 4096 % 4096
    ({"coordinator_address": "b:9"}, OMPI, Placement("b:9", 4, 3, (1,))),
  ],
)
def test_who_this_process_is(options, environment, expected, monkeypatch):
  for name in list(SLURM) + list(ORTE):
    monkeypatch.delenv(name, raising=False)
  for name, value in environment.items():
    monkeypatch.setenv(name, value)  # JAX's detection reads the real environment
  assert find_placement(Options(**options), environment | {"JAX_PLATFORMS": "cpu"}) == expected


@pytest.mark.parametrize(
  ("options", "environment", "message"),
  [
    ({"num_processes": 2}, {}, "--coordinator_address: must be given too, for --num_processes is given"),
    ({"coordinator_address": "a:1", "process_id": 0}, {}, "--num_processes: must be given too"),
    ({"coordinator_address": "a:1", "num_processes": 2}, {}, "--process_id: must be given too"),
    ({}, OMPI, "--coordinator_address: must be given too, for ompi started several processes"),
    (
      {"coordinator_address": "a:1", "num_processes": 2, "process_id": 2},
      {},
      "--process_id=2: must be between 0 and 1, for --num_processes=2",
    ),
    (
      {"coordinator_address": "a", "num_processes": 2, "process_id": 0},
      {},
      "--coordinator_address=a: must be HOST:PORT",
    ),
    ({"coordinator_address": "a:b", "num_processes": 2, "process_id": 0}, {}, "must be HOST:PORT"),
  ],
)
def test_what_is_missing_or_wrong_is_one_line(options, environment, message):
  with pytest.raises(InputError, match=message) as caught:
    find_placement(Options(**options), environment | {"JAX_PLATFORMS": "cpu"})
  assert "\n" not in str(caught.value)


# The roll call, with threads for processes.


@pytest.fixture
def address(monkeypatch):
  monkeypatch.setattr(roll_call, "_LINGER", 0.5)
  with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
  return f"127.0.0.1:{port}"


class Ended(threading.Event):
  """Stands for the end of a process."""

  def __init__(self):
    super().__init__()
    self.lines, self.status = [], None

  def __call__(self, line, status):
    if line:
      self.lines.append(line)
    if status >= 0:
      self.status = status
      self.set()


def _join_all(rolls):
  """(index -> watch or InputError, index -> Ended), each joined in a thread of its own."""
  found, ends = {}, {i: Ended() for i in range(len(rolls))}

  def join(i):
    try:
      found[i] = roll_call.join(rolls[i], ends[i])
    except InputError as error:
      found[i] = error

  threads = [threading.Thread(target=join, args=(i,)) for i in range(len(rolls))]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(60)
  return found, ends


def _roll(address, index, count=3, timeout=30.0, heartbeat=30.0, flags=""):
  return roll_call.Roll(address, count, index, timeout, heartbeat, flags)


def test_all_join_and_leave(address):
  found, ends = _join_all([_roll(address, i) for i in range(3)])
  assert all(isinstance(watch, roll_call.Watch) for watch in found.values())
  for watch in found.values():
    watch.leave()
  for watch in found.values():
    for peer in watch._peers:
      peer.connection.close()
  time.sleep(0.2)
  assert not any(end.lines or end.is_set() for end in ends.values())


def test_who_is_missing_is_told_to_all(address):
  found, _ = _join_all([_roll(address, 0, 4, 2.0), _roll(address, 2, 4, 2.0)])
  for error in found.values():
    assert "--num_processes=4: processes 1, 3 did not join at 127.0.0.1:" in str(error)


@pytest.mark.parametrize(
  ("second", "message"),
  [
    ({"index": 1, "count": 3}, "--num_processes=3: the process on .* was given that, process 0 2"),
    ({"index": 5, "count": 2}, "--process_id=5: .*each of 0 to 1 once"),
    ({"index": 1, "count": 2, "flags": "other"}, "process 1: .* started with other flags than process 0"),
  ],
)
def test_a_process_that_does_not_fit_is_refused(address, second, message):
  found, _ = _join_all([_roll(address, 0, 2), _roll(address, **second)])
  for error in found.values():
    with pytest.raises(InputError, match=message):
      raise error


def test_a_program_that_is_no_process_of_ours_does_not_disturb(address):
  stop = threading.Event()

  def knock():
    while not stop.is_set():
      try:
        with socket.create_connection(roll_call.split_address(address), timeout=1) as other:
          other.sendall(b"GET / HTTP/1.1\n\n")
      except OSError:
        time.sleep(0.01)

  other = threading.Thread(target=knock)
  other.start()
  found, _ = _join_all([_roll(address, i, 2) for i in (0, 1)])
  stop.set()
  other.join(10)
  assert all(isinstance(watch, roll_call.Watch) for watch in found.values())


@pytest.mark.parametrize("gone", [0, 1])
def test_when_one_is_gone_all_others_end(address, gone):
  found, ends = _join_all([_roll(address, i) for i in range(3)])
  watch = found[gone]
  watch._stopping = True  # it is dead: its thread does nothing any more
  for peer in watch._peers:
    peer.connection.shutdown(socket.SHUT_RDWR)
  for i, end in ends.items():
    if i != gone:
      assert end.wait(30) and end.status == 1
      (line,) = end.lines
      assert f"process {gone} of 3" in line and "died or was killed" in line


def test_one_that_gives_no_sign_counts_as_gone(address):
  found = {}
  thread = threading.Thread(target=lambda: found.update(end=Ended()))
  thread.start()
  thread.join()
  caller = threading.Thread(
    target=lambda: found.update(watch=roll_call.join(_roll(address, 0, 2, heartbeat=2.0), found["end"]))
  )
  caller.start()
  deadline = time.monotonic() + 30
  while time.monotonic() < deadline:
    try:
      silent = socket.create_connection(roll_call.split_address(address), timeout=1)
      break
    except OSError:
      time.sleep(0.01)
  silent.sendall(b'{"moe_jax": 1, "num_processes": 2, "host": "h", "pid": 7, "flags": ""}\n')
  assert found["end"].wait(30)
  (line,) = found["end"].lines
  assert "process 1 of 2 (h, pid 7) has given no sign for 2 s" in line
  silent.close()
  caller.join(10)


def test_a_failure_is_told_with_its_reason_and_status(address):
  found, ends = _join_all([_roll(address, i) for i in range(3)])
  threading.Thread(target=found[2].stop, args=("--x=1: is wrong", 2), daemon=True).start()
  for i in (0, 1):
    assert ends[i].wait(30) and ends[i].status == 2
    (line,) = ends[i].lines
    assert line.startswith("process 2 of 3 (") and line.endswith("stopped: --x=1: is wrong")
  assert ends[2].wait(30) and ends[2].lines == []  # it has said so itself


# Which rows of the batch.


class _Device(NamedTuple):
  id: int
  process_index: int


class _Layout:
  """Stands for a sharding: the rows of each device, two devices per process."""

  def __init__(self, starts, rows):
    self.starts, self.rows = starts, rows

  def devices_indices_map(self, shape):
    return {_Device(i, i // 2): (slice(s, s + self.rows),) for i, s in enumerate(self.starts)}


@pytest.mark.parametrize(
  ("starts", "rows", "expected"),
  [
    ([0, 2, 4, 6], 2, [(0, 2), (1, 2)]),  # the batch over all devices
    ([6, 4, 2, 0], 2, [(1, 2), (0, 2)]),  # the other way round
    ([0, 0, 0, 0], 8, [(0, 1), (0, 1)]),  # no axis splits it
    ([0, 4, 0, 4], 4, [(0, 1), (0, 1)]),  # tensor goes across processes
    ([0, 0, 4, 4], 4, [(0, 2), (1, 2)]),
  ],
)
def test_the_share_is_what_the_devices_hold(starts, rows, expected, monkeypatch):
  for process, share in enumerate(expected):
    monkeypatch.setattr(jax, "process_index", lambda p=process: p)
    found = processes.batch_share(_Layout(starts, rows), 8)
    assert (found.index, found.count) == share


def test_scattered_rows_are_picked_from_the_whole_batch(monkeypatch):
  batch = np.arange(8)
  for process, expected in enumerate([[0, 1, 4, 5], [2, 3, 6, 7]]):
    monkeypatch.setattr(jax, "process_index", lambda p=process: p)
    share = processes.batch_share(_Layout([0, 4, 2, 6], 2), 8)
    assert (share.index, share.count) == (0, 1)
    np.testing.assert_array_equal(batch[share.rows], expected)


def test_the_position_in_the_data_goes_from_one_number_of_processes_to_another():
  parts = {
    1: {"step": 3, "rows": {"group": [7, 8], "used": [1, 0]}},
    0: {"step": 3, "rows": {"group": [5, 6], "used": [0, 2]}},
  }
  whole = processes.merge_states(parts)
  assert whole == {"step": 3, "rows": {"group": [5, 6, 7, 8], "used": [0, 2, 1, 0]}}
  for index, part in parts.items():
    assert processes.BatchShare(index, 2).state_to_load(whole) == part
  assert processes.BatchShare(3, 4).state_to_load(whole)["rows"] == {"group": [8], "used": [0]}
  assert processes.BatchShare(0, 1).state_to_load(whole) == whole
