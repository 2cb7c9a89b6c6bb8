"""Disturbs runs of several processes, starts them again, and compares their ends with that of an undisturbed run.

  python scripts/soak_cluster.py --processes=2,4
  python scripts/soak_cluster.py --processes=2 --beside
  python scripts/soak_cluster.py --processes=2 --faults="kill -9 of process 0,process 0 cut off"

For each number of processes, one small comparison of one arm is trained to its end without faults. Then it is trained in
another folder, and disturbed by one fault after the other; after each, the same command is started again. It prints
a line for each fault: how many seconds until all processes had ended, with which statuses, and whether the next start
followed the undisturbed run bit by bit. A time above the one in docs/reliability.md is marked, and they are counted; one that is 30 s
above it is a failure. At the end, parameters, optimizer, result and metrics must be those of the
undisturbed run, and a copy of the disturbed folder, continued by fewer processes on the same mesh, must follow its
losses within 2e-5. The exit status is 1 where that is not so.

Each process has a network namespace, a host of its own on one virtual bridge, so that it can be cut off without a word to its
connections. That takes Linux with `unshare`, `nsenter` and `ip`, and root or user namespaces. --network=loopback does without,
and leaves those faults out.

These runs save again before the processes beside them have written. With --beside, a run waits at each save until they have.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import flags
from soak_hosts import BOUND, HEARTBEAT, SLOW, Cluster, Failed, Hosts, Times, TooSlow

from moe_jax import cli
from moe_jax.errors import STOPPED_STATUS, InputError

LIMIT = 300.0  # seconds that a start may take
DEVICES = 4  # of all processes together
ABORT = -signal.SIGABRT  # JAX's own, where the store is gone
METHOD = "switch_loss:0.1+loss_free_bias:0.01"
FLAGS = {
  "methods": METHOD, "seeds": 1, "num_layers": 1, "model_dim": 16, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8,
  "num_experts": 4, "expert_dim": 16, "jitter": 0.1, "dataset": "markov", "markov_states": 32, "sequence_length": 16,
  "batch_size": 8, "warmup_steps": 3, "log_every": 1, "checkpoint_every": 4, "eval_batches": 2,
  "dispatcher": "sorted", "data_parallelism": 2, "expert_parallelism": 2, "heartbeat_timeout": HEARTBEAT,
}  # fmt: skip

_PROCESSES = flags.DEFINE_list(
  "processes", ["2", "4"], "how many processes; 2, 4, or both, one after the other"
)
_FAULTS = flags.DEFINE_list("faults", [], "only these, by name; empty: all")
_FOLDER = flags.DEFINE_string("folder", "runs/soak_cluster", "for the runs; replaced")
_STEPS = flags.DEFINE_integer(
  "steps", 120, "of a run; a fault strikes 2 to 8 steps after the last", lower_bound=8
)
_SEED = flags.DEFINE_integer("seed", 0, "of the steps at which faults strike")
_BESIDE = flags.DEFINE_bool(
  "beside", False, "runs wait at each save, so that it is written by the processes beside them (Linux)"
)
_NETWORK = flags.DEFINE_enum(
  "network", "namespaces", ["namespaces", "loopback"], "what the processes talk over"
)


@dataclasses.dataclass(frozen=True)
class Fault:
  """What happens to a start. `strike` gets the soak and the processes.

  Args:
    strike: None if the fault is there from the start.
    statuses: that processes may end with.
    victim: the process that is stopped, and does not end before it is continued; -1: none.
    largest: the process that cannot write; -1: none.
  """

  strike: Callable[["Soak", Cluster], None] | None
  statuses: tuple[int, ...]
  victim: Callable[[int], int] = lambda count: -1
  limited: Callable[[int], int] = lambda count: -1
  needs: str = ""


_last = lambda count: count - 1
_first = lambda count: 0


def _send(which: Callable[[int], int], number: int) -> Callable[["Soak", Cluster], None]:
  return lambda soak, cluster: cluster.send(which(cluster.count), number)


def _cut(which: Callable[[int], list[int]]) -> Callable[["Soak", Cluster], None]:
  return lambda soak, cluster: soak.hosts.cut_off(which(cluster.count))


def _cut_shortly(soak: "Soak", cluster: Cluster) -> None:
  soak.hosts.cut_off([cluster.count - 1])
  time.sleep(3.0)
  soak.hosts.heal()
  soak.until(cluster, soak.step() + 4)
  cluster.send(0, signal.SIGTERM)


def _fill(soak: "Soak", cluster: Cluster) -> None:
  with contextlib.suppress(OSError), (soak.folder / "filler").open("wb", buffering=0) as file:
    while True:
      file.write(bytes(65536))


KILLED, GONE = -signal.SIGKILL, (1, ABORT)
FAULTS = {
  "kill -9 of the last process": Fault(_send(_last, signal.SIGKILL), (KILLED, 1)),
  "kill -9 of process 0": Fault(_send(_first, signal.SIGKILL), (KILLED, *GONE)),
  "SIGTERM to the last process": Fault(_send(_last, signal.SIGTERM), (STOPPED_STATUS,)),
  "SIGTERM to process 0": Fault(_send(_first, signal.SIGTERM), (STOPPED_STATUS,)),
  "SIGSTOP of the last process": Fault(_send(_last, signal.SIGSTOP), GONE, victim=_last),
  "SIGSTOP of process 0": Fault(_send(_first, signal.SIGSTOP), GONE, victim=_first),
  "the last process cannot write": Fault(None, (2,), limited=_last),
  "process 0 cannot write": Fault(None, (2,), limited=_first),
  "full disk": Fault(_fill, (2,), needs="namespaces"),
  "the last process cut off": Fault(_cut(lambda count: [count - 1]), GONE, needs="namespaces"),
  "process 0 cut off": Fault(_cut(lambda count: [0]), GONE, needs="namespaces"),
  "one half cut off from the other": Fault(
    _cut(lambda count: [*range(count // 2, count)]), GONE, needs="namespaces"
  ),
  "the last process cut off for 3 s": Fault(_cut_shortly, (STOPPED_STATUS,), needs="namespaces"),
}


class Soak:
  """The undisturbed run of `count` processes, and the disturbed one."""

  def __init__(self, folder: pathlib.Path, count: int):
    self.count, self.random, self.times = count, random.Random(_SEED.value), Times()
    self.hosts = Hosts(count) if _NETWORK.value == "namespaces" else None
    self.folder, self.whole, self.output_dir = folder, folder / "whole", folder / "run"
    folder.mkdir(parents=True)
    if self.hosts:  # a small disk
      subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], check=True)
    again_if_slow(lambda: self.finish(self.whole, count))
    self.expected = _metrics(self.whole)
    if len(self.expected) != _STEPS.value:
      raise Failed(f"{self.whole}: {len(self.expected)} lines of metrics")

  def finish(self, output_dir: pathlib.Path, count: int) -> None:
    cluster = self._start(count, output_dir, {})
    try:
      statuses = cluster.wait(LIMIT)
    finally:
      cluster.kill()
    if set(statuses) != {0}:
      cluster.fail(f"{output_dir}: ended with {statuses}")

  def _start(self, count: int, output_dir: pathlib.Path, limited: dict[int, int]) -> Cluster:
    arguments = [f"--{name}={value}" for name, value in FLAGS.items()] + [f"--num_steps={_STEPS.value}"]
    return Cluster(
      count, output_dir, self.hosts if count > 1 else None, arguments, DEVICES, limited, _BESIDE.value
    )

  def step(self) -> int:
    return len(_metrics(self.output_dir, whole=False))

  def until(self, cluster: Cluster, step: int) -> None:
    deadline = time.monotonic() + LIMIT
    while self.step() < step:
      if len(cluster.running()) < cluster.count or time.monotonic() > deadline:
        cluster.fail(f"step {step} is not reached")
      time.sleep(0.05)

  def disturb(self, name: str) -> str:
    """One start with one fault. Returns the line of the table."""
    fault = FAULTS[name]
    limited = {fault.limited(self.count): 3000}
    cluster = self._start(self.count, self.output_dir, limited)
    try:
      if fault.strike:
        self.until(cluster, self.step() + self.random.randrange(2, 9))
        fault.strike(self, cluster)
      started = time.monotonic()
      victim = fault.victim(self.count)
      statuses = cluster.wait(LIMIT if fault.strike is None else BOUND + SLOW, but=victim)
      seconds = time.monotonic() - started
      if victim >= 0:
        cluster.send(victim, signal.SIGCONT)
        started = time.monotonic()
        statuses = cluster.wait(BOUND + SLOW)
        seconds = max(seconds, time.monotonic() - started)
    finally:
      cluster.kill()
      if self.hosts:
        self.hosts.heal()
      (self.folder / "filler").unlink(missing_ok=True)
    self._check(statuses, fault, cluster)
    time_of = self.times.note(name, seconds) if fault.strike else "at the first save"
    return f"| {name} | {self.count} | {time_of} | {' '.join(map(str, statuses))} |"

  def _check(self, statuses: list[int | None], fault: Fault, cluster: Cluster) -> None:
    if not set(statuses) <= set(fault.statuses):
      cluster.fail(f"ended with {statuses}, expected {fault.statuses}")
    if ABORT in statuses:
      time.sleep(2.0)  # the line comes from a process that outlives the abort
    for status, said in zip(statuses, cluster.said(), strict=True):
      one_line = said.count("error: ") == 1 and "Traceback" not in said and "stack trace" not in said
      if status in (1, 2, ABORT) and not one_line:
        raise Failed(f"not one line: {said}")
    found = _metrics(self.output_dir)
    if found != self.expected[: len(found)]:
      raise Failed("the numbers are not those of the undisturbed run")

  def compare(self) -> None:
    """Raises `Failed` if the end is not that of the undisturbed run."""
    own, whole = (_run_folder(folder) for folder in (self.output_dir, self.whole))
    saved = [folder / f"checkpoints/{_STEPS.value}/extra/metadata" for folder in (whole, own)]
    arrays = [json.loads(path.read_text())["arrays"] for path in saved]
    results = [json.loads((folder / "result.json").read_text()) for folder in (whole, own)]
    pairs = {"arrays": arrays, "validation": [r["validation"] for r in results]}
    pairs["metrics"] = [self.expected, _metrics(self.output_dir)]
    for name, (expected, found) in pairs.items():
      if expected != found:
        raise Failed(f"{self.output_dir}: other {name} than the undisturbed run")

  def with_fewer(self, folder: pathlib.Path, count: int) -> str:
    """Continues a copy of the disturbed run with `count` processes."""
    copy = self.folder / f"with_{count}"
    shutil.copytree(folder, copy)
    before = len(_metrics(copy))
    self.finish(copy, count)
    losses = [[line["loss"] for line in lines] for lines in (self.expected, _metrics(copy))]
    difference = float(np.max(np.abs(np.divide(*losses) - 1)))
    if len(losses[0]) != len(losses[1]) or difference > 2e-5:
      raise Failed(f"{count} processes: {len(losses[1])} steps, losses differ by {difference:.1g}")
    return f"{count} of {self.count} processes from step {before} on: losses within {difference:.1g}"


def _run_folder(output_dir: pathlib.Path) -> pathlib.Path:
  return output_dir / "arms" / METHOD.replace(":", "_") / "seed_0"


def _metrics(output_dir: pathlib.Path, whole: bool = True) -> list[dict]:
  path = _run_folder(output_dir) / "metrics.jsonl"
  lines = path.read_text().splitlines(keepends=True) if path.exists() else []
  lines = [line for line in lines if line.endswith("\n")]  # a process that is killed leaves a piece
  if not whole:
    return lines
  return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in lines]


def again_if_slow(start: Callable[[], Any]) -> Any:
  for _ in range(3):
    with contextlib.suppress(TooSlow):
      return start()
    print("a process was more than 30 s behind another, and JAX gave up; the start is repeated", flush=True)
  raise Failed("the machine is too slow")


def soak(folder: pathlib.Path, count: int, names: list[str]) -> None:
  """Prints the table of one number of processes."""
  one = Soak(folder, count)
  try:
    for i, name in enumerate(names):
      print(again_if_slow(lambda name=name: one.disturb(name)), flush=True)
      if i == len(names) // 2:
        shutil.copytree(one.output_dir, one.folder / "half")
    again_if_slow(lambda: one.finish(one.output_dir, count))
    one.compare()
    print(f"{count} processes, {one.times.summary()}", flush=True)
    print(f"{count} processes, after {len(names)} faults: the end is that of the undisturbed run", flush=True)
    for fewer in [c for c in (2, 1) if c < count]:
      print(one.with_fewer(one.folder / "half", fewer), flush=True)
  finally:
    if one.hosts:
      one.hosts.close()


def main(argv: list[str]) -> None:
  namespaces = _NETWORK.value == "namespaces"
  if namespaces and "MOE_JAX_SOAK_INSIDE" not in os.environ:
    if not all(shutil.which(name) for name in ("unshare", "nsenter", "ip")):
      raise InputError("--network=namespaces: needs unshare, nsenter and ip; or choose --network=loopback")
    os.environ["MOE_JAX_SOAK_INSIDE"] = "1"
    os.execvp("unshare", ["unshare", "--map-root-user", "--net", "--mount", sys.executable, *sys.argv])
  for name in _FAULTS.value:
    if name not in FAULTS:
      raise InputError(f"--faults={name}: must be of {', '.join(FAULTS)}")
  names = _FAULTS.value or [n for n, fault in FAULTS.items() if namespaces or not fault.needs]
  folder = pathlib.Path(_FOLDER.value).absolute()
  shutil.rmtree(folder, ignore_errors=True)
  try:
    for count in _PROCESSES.value:
      soak(folder / count, int(count), names)
  except Failed as error:
    print(f"FAILED: {error}")
    sys.exit(1)


if __name__ == "__main__":
  cli.run(main)
