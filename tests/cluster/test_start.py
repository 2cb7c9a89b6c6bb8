"""Several processes without starting any: who this process is, how all end, and which rows it reads."""

import contextlib
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax._src.lib import _jax

from moe_jax.cluster import processes, watch
from moe_jax.cluster.placement import Options, Placement, find_placement
from moe_jax.cluster.start import start
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
HERE = f"{socket.gethostname()}, pid {os.getpid()}"
by_hand = lambda address, i: {"coordinator_address": address, "num_processes": 2, "process_id": i}
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
    (by_hand("a:1", 1), {}, Placement("a:1", 2, 1)),
    ({}, SLURM, Placement("gpu07:61441", 4, 3, (1,))),  # 61440 + 4097 % 4096
    # bound by SLURM already
    ({}, SLURM | {"CUDA_VISIBLE_DEVICES": "1"}, Placement("gpu07:61441", 4, 3, None)),
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
    (by_hand("a:1", 2), {}, "--process_id=2: must be between 0 and 1, for --num_processes=2"),
    (by_hand("a", 0), {}, "--coordinator_address=a: must be HOST:PORT"),
    (by_hand("a:b", 0), {}, "must be HOST:PORT"),
  ],
)
def test_what_is_missing_or_wrong_is_one_line(options, environment, message):
  with pytest.raises(InputError, match=message) as caught:
    find_placement(Options(**options), environment | {"JAX_PLATFORMS": "cpu"})
  assert "\n" not in str(caught.value)


def test_a_port_that_is_taken_is_one_line():
  with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
    with pytest.raises(InputError, match=f"process 0 cannot listen at port {port}"):
      start(Options(f"127.0.0.1:{port}", 2, 0))


# How they end: JAX's own service and clients, with threads for processes.


@pytest.fixture
def ended(monkeypatch):
  """(line, status) of each process that has ended."""
  found = queue.Queue()

  monkeypatch.setattr(watch, "end", lambda line, status, seconds: found.put((line, status)))
  monkeypatch.setattr(watch, "_ANSWER", 1000)
  monkeypatch.setattr(watch, "_current", None)  # which the watches below set, and later tests would ask
  yield found
  for thread in threading.enumerate():  # with the real `end`, a late one would end the tests
    if thread.name == watch.THREAD:
      thread.join()


@pytest.fixture
def clients(ended):
  """Three connected clients of one service."""
  with socket.create_server(("127.0.0.1", 0)) as server:
    address = f"127.0.0.1:{server.getsockname()[1]}"
  service = _jax.get_distributed_runtime_service(address, 3, recoverable=True)
  found = [_jax.get_distributed_runtime_client(address, i, init_timeout=60) for i in range(3)]
  with ThreadPoolExecutor() as pool:
    list(pool.map(lambda client: client.connect(), found))
  yield found
  for client in found:
    with contextlib.suppress(RuntimeError):  # it has left already
      client.shutdown()
  service.shutdown()


@contextlib.contextmanager
def _watching(clients, ids=(0, 1, 2), heartbeat_timeout=60.0):
  watches = [watch.Watch(clients[i], i, 3, heartbeat_timeout) for i in ids]
  yield watches
  for one in watches:
    one._leaving.set()


def _stop(one, *reason):
  threading.Thread(target=one.stop, args=reason, daemon=True).start()


def test_all_leave_together(clients, ended):
  with _watching(clients, heartbeat_timeout=0.4) as watches, ThreadPoolExecutor() as pool:
    leaving = [pool.submit(one.leave) for one in watches[:2]]
    assert not wait(leaving, 1.5).done  # they wait for the third, whose heartbeats are fine
    leaving.append(pool.submit(watches[2].leave))
    for i in (1, 2):
      leaving[i].result(30)
      clients[i].shutdown()
    leaving[0].result(30)
  assert ended.empty() and not any(thread.is_alive() for one in watches for thread in one._threads)


def test_a_failure_is_told_with_its_reason_and_status(clients, ended):
  with _watching(clients) as watches:
    _stop(watches[2], "--x=1: is wrong", 2)
    told = sorted(ended.get(timeout=30) for _ in range(3))
    assert told[0] == ("--x=1: is wrong", 2)
    assert told[1] == told[2] == (f"process 2 of 3 ({HERE}) stopped: --x=1: is wrong", 2)


def test_one_that_does_not_answer_is_named_in_place_of_what_others_fail_with(clients, ended):
  clients[1].key_value_set("moe_jax/host/1", "h, pid 7")
  with _watching(clients, (0, 2)) as watches:
    _stop(watches[0], "ValueError: connection reset", 1)
    for line, status in (ended.get(timeout=30) for _ in range(2)):
      assert status == 1
      assert line.startswith(
        "process 1 of 3 (h, pid 7) died, was killed or hangs (process 0: ValueError: conn"
      )


def test_one_whose_heartbeats_end_is_noticed(clients, ended):
  with _watching(clients, (0, 2), heartbeat_timeout=0.4):
    clients[1].shutdown()
    for line, status in (ended.get(timeout=30) for _ in range(2)):
      assert status == 1
      assert re.match(
        r"process 1 of 3 died, was killed or hangs \(process [02]: no heartbeat for 0.4 s", line
      )


def test_other_flags_and_other_code_are_named(clients, ended):
  with _watching(clients) as watches:
    versions = ["moe_jax [1a]", "jax 0.10"]
    watches[0].check_same_start(["--a=1", "--b=2", "--process_id=0"], versions)
    watches[1].check_same_start(["--a=1", "--b=2", "--process_id=1"], versions)
    with pytest.raises(InputError, match=r"process 2 has --b=3, process 0 has --b=2$"):
      watches[2].check_same_start(["--a=1", "--b=3", "--process_id=2"], versions)
    with pytest.raises(InputError, match=r"process 2 has moe_jax \[2b\], process 0 has moe_jax \[1a\]$"):
      watches[2].check_same_start(["--a=1", "--b=2", "--process_id=2"], ["moe_jax [2b]", "jax 0.10"])


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


@pytest.mark.parametrize(("mine", "other"), [("mine", ""), ("", "other's"), ("mine", "other's"), ("", "")])
def test_what_one_process_refuses_all_refuse(mine, other, monkeypatch):
  monkeypatch.setattr(processes, "from_all", lambda value: [value, other])
  refusal = (
    pytest.raises(InputError, match=f"^{mine or other}$") if mine + other else contextlib.nullcontext()
  )
  with refusal, processes.refused_together():
    if mine:
      raise InputError(mine)


@pytest.mark.parametrize("used", [([0, 2], [1, 0]), ([3, 3], [3, 3])], ids=["different", "equal"])
def test_the_position_in_the_data_goes_from_one_number_of_processes_to_another(used):
  parts = {
    1: {"step": 3, "rows": {"group": [7, 8], "used": used[1]}},
    0: {"step": 3, "rows": {"group": [5, 6], "used": used[0]}},
  }
  whole = processes.merge_states(parts)
  assert whole == {"step": 3, "rows": {"group": [5, 6, 7, 8], "used": used[0] + used[1]}}
  for index, part in parts.items():
    assert processes.BatchShare(index, 2).state_to_load(whole) == part
  assert processes.BatchShare(3, 4).state_to_load(whole)["rows"] == {"group": [8], "used": used[1][1:]}
  assert processes.BatchShare(0, 1).state_to_load(whole) == whole


def test_a_page_of_jax_becomes_one_line_and_the_rest_is_passed_on():
  program = """
import os, sys
from moe_jax.cluster import abort
abort.in_one_line("lost")
print("of Python", file=sys.stderr)
os.write(2, b"of C++\\nE1 agent.cc] Polled an error from coordination service (this)\\n")
abort.write("at once")
os.write(2, b"F1 client.h:86] Terminating process because the JAX distributed service detected fatal errors.\\n a\\n b")
os.abort()
"""
  found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
  assert found.returncode == -signal.SIGABRT
  assert sorted(found.stderr.splitlines()) == ["at once", "error: lost", "of C++", "of Python"]
