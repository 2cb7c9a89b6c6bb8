"""Two real processes with four virtual devices each, over Gloo on the loopback interface, against one process.

The first run is killed halfway. What it left is continued by one process on eight devices, by one on four (another
mesh), and by two processes with the same command; all must follow the curve of a run that was never stopped.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from moe_jax.config import Config, MeshConfig
from moe_jax.data import load_dataset
from moe_jax.models import preset
from moe_jax.training.loop import Run
from moe_jax.training.metric_writer import read_jsonl
from tests import tiny

HEARTBEAT = 8  # --heartbeat_timeout, seconds
# Gloo reports a process that is gone at once, but process 0 may be waiting for it in a save, where only heartbeats
# tell. They are asked for every quarter of their time limit; then come 5 s for an answer. The rest is for a busy machine.
BOUND = 1.25 * HEARTBEAT + 6 + 20
SLOW = 240.0  # seconds that anything may take on a machine with much else to do; the tests need far fewer
ARM = "switch_loss:0.1+loss_free_bias:0.01"
FIELDS = {
  "num_layers": 1,
  "model_dim": 16,
  "num_heads": 2,
  "num_kv_heads": 1,
  "head_dim": 8,
  "num_experts": 8,
  "expert_dim": 16,
  "dispatcher": "sorted",
  "capacity_factor": 1.0,
  "jitter": 0.1,
  "remat": "none",
  "dataset": "markov",
  "markov_states": tiny.VOCAB,
  "markov_domains": tiny.DOMAINS,
  "sequence_length": 16,
  "batch_size": 16,
  "num_steps": 16,
  "warmup_steps": 3,
  "log_every": 1,
  "checkpoint_every": 4,
  "eval_batches": 2,
  "tensorboard": False,
}
BOTH = MeshConfig(data=4, expert=2)
FLAGS = [f"--{name}={value}" for name, value in FIELDS.items()]
FLAGS += [f"--methods={ARM}", "--seeds=1", "--data_parallelism=4", "--expert_parallelism=2"]

XLA_FLAGS = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"]).strip()
ENVIRONMENT = os.environ | {"XLA_FLAGS": XLA_FLAGS, "PYTHONPATH": os.getcwd()}


def _free_port() -> int:
  with socket.create_server(("127.0.0.1", 0)) as server:
    return server.getsockname()[1]


class Pair:
  """Two processes; leaving it kills what still runs, by process id."""

  def __init__(self, command: list[str], folder: pathlib.Path, ids=(0, 1), timeout: float = SLOW, own=None):
    self.outputs = {i: folder / f"{folder.name}_{i}_{time.monotonic_ns()}.txt" for i in ids}
    address = f"--coordinator_address=127.0.0.1:{_free_port()}"
    env = ENVIRONMENT | {"XLA_FLAGS": f"{XLA_FLAGS} --xla_force_host_platform_device_count=4"}
    self.processes = {}
    for i, path in self.outputs.items():
      place = [address, "--num_processes=2", f"--process_id={i}", f"--initialization_timeout={timeout}"]
      place += (own or {}).get(i, "").split()
      with path.open("w") as out:
        self.processes[i] = subprocess.Popen(
          [sys.executable, *command, *place], stdout=out, stderr=out, env=env
        )

  def __enter__(self):
    return self

  def __exit__(self, *unused_exception):
    for process in self.processes.values():
      if process.poll() is None:
        process.kill()
      process.wait(timeout=30)

  def output(self, i: int) -> str:
    return self.outputs[i].read_text()

  def wait_until(self, condition, seconds: float, what: str):
    deadline = time.monotonic() + seconds
    while not condition():
      ended = [i for i, process in self.processes.items() if process.poll() is not None]
      assert not ended and time.monotonic() < deadline, (
        f"no {what}: {[self.output(i)[-2000:] for i in ended]}"
      )
      time.sleep(0.02)

  def ends(self, i: int, seconds: float) -> int:
    return self.processes[i].wait(timeout=seconds)


def _run_folder(output_dir: pathlib.Path) -> pathlib.Path:
  return output_dir / "arms" / ARM.replace(":", "_") / "seed_0"


def _losses(folder: pathlib.Path) -> dict[int, float]:
  return {line["step"]: line["loss"] for line in read_jsonl(folder / "metrics.jsonl")}


def _assert_same_curve(actual: dict[int, float], expected: dict[int, float]) -> None:
  steps = list(actual)
  assert steps == list(range(1, len(steps) + 1))  # each step once, in order
  np.testing.assert_allclose([actual[s] for s in steps], [expected[s] for s in steps], rtol=2e-5)


def _config(mesh: MeshConfig) -> Config:
  return tiny.change(preset("default"), **FIELDS, balancers=ARM.replace("+", ","), mesh=mesh)


@pytest.fixture(scope="module")
def dataset():
  return load_dataset(_config(BOTH).data)


@pytest.fixture(scope="module")
def expected(dataset, tmp_path_factory):
  """The losses of one process on the same eight devices, never stopped."""
  folder = tmp_path_factory.mktemp("expected")
  Run(_config(BOTH), dataset, folder).train()
  return _losses(folder)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
  """(output folder, exit status of the survivor, seconds it took, its output) of a run whose process 1 was killed."""
  folder = tmp_path_factory.mktemp("two")
  output_dir = folder / "run"
  metrics, checkpoints = _run_folder(output_dir) / "metrics.jsonl", _run_folder(output_dir) / "checkpoints"
  flags = [*FLAGS, f"--heartbeat_timeout={HEARTBEAT}", f"--output_dir={output_dir}"]
  with Pair(["experiments/load_balancing.py", *flags], folder) as pair:
    saved = lambda: metrics.exists() and '"step": 6' in metrics.read_text() and (checkpoints / "4").is_dir()
    pair.wait_until(saved, SLOW, "sixth step")
    pair.processes[1].kill()
    started = time.monotonic()
    status = pair.ends(0, SLOW)
    return output_dir, status, time.monotonic() - started, pair.output(0)


def test_a_process_that_is_killed_ends_the_other_with_one_line(killed):
  output_dir, status, seconds, output = killed
  assert status == 1 and seconds < BOUND
  (line,) = re.findall(r"(?m)^error: .*", output)
  assert re.fullmatch(
    r"error: process 1 of 2 \(.*, pid \d+\) died, was killed or hangs \(process 0: .*\); all processes stop, .*",
    line,
  )
  assert "Traceback" not in output and "Check failure" not in output
  assert not (_run_folder(output_dir) / "result.json").exists()


def test_two_processes_follow_the_curve_of_one(killed, expected):
  losses = _losses(_run_folder(killed[0]))
  assert 6 <= len(losses) < FIELDS["num_steps"]
  _assert_same_curve(losses, expected)


@pytest.mark.parametrize("mesh", [BOTH, MeshConfig(data=1, expert=4)], ids=["8 devices", "4 devices"])
def test_one_process_continues_what_two_have_saved(killed, expected, dataset, tmp_path, mesh):
  folder = tmp_path / "run"
  shutil.copytree(_run_folder(killed[0]), folder)
  progress = tiny.StopsAt(0)
  Run(_config(mesh), dataset, folder, progress=progress).train()
  resumed_at = int(progress.notes[0].rsplit(" ", 1)[1])
  assert resumed_at >= 4 and resumed_at % 4 == 0
  losses = _losses(folder)
  assert len(losses) == FIELDS["num_steps"]
  _assert_same_curve(losses, expected)


def test_the_same_flags_continue_and_everything_is_written_once(killed, expected, tmp_path):
  """Through the launcher for one machine, on the same mesh and batches."""
  output_dir = tmp_path / "run"
  shutil.copytree(killed[0], output_dir)
  command = ["bash", "scripts/launch/local.sh", f"--python={sys.executable}", "--", *FLAGS]
  ended = subprocess.run(
    [*command, f"--output_dir={output_dir}"], capture_output=True, text=True, timeout=SLOW, env=ENVIRONMENT
  )
  assert ended.returncode == 0, ended.stderr
  lines = ended.stdout.splitlines()
  assert lines and all(line.startswith("[0] ") for line in lines)  # process 1 has nothing to say
  assert (
    sum("continues from step" in line for line in lines) == sum("report: " in line for line in lines) == 1
  )
  folder = _run_folder(output_dir)
  _assert_same_curve(_losses(folder), expected)
  assert len(_losses(folder)) == FIELDS["num_steps"]
  result = json.loads((folder / "result.json").read_text())
  assert result["device"].endswith("x 8")
  newest = folder / "checkpoints" / str(FIELDS["num_steps"]) / "state"
  assert {path.name for path in newest.glob("ocdbt.process_*")} == {"ocdbt.process_0", "ocdbt.process_1"}


TALK = """
from moe_jax import cli
from moe_jax.cluster import start as distributed
distributed.define_flags()
def main(argv):
  from moe_jax.cluster import processes
  for step in range(100_000):
    processes.from_all(step)
    if step == 3: print("talking", flush=True)
cli.run(distributed.on_every_process(main))
"""
ASKED = """
import time
from moe_jax import cli
from moe_jax.cluster import start as distributed
from moe_jax.errors import Stopped
distributed.define_flags()
def main(argv):
  import jax
  from moe_jax.cluster import processes
  from moe_jax.training.stops import Stops
  with Stops() as stops:
    for step in range(100_000):
      if step % 7 == 0:
        processes.from_all(step)  # the processes are up to six steps apart
      time.sleep(0.02 * jax.process_index())
      if reason := stops.reached():
        print(f"saved {step}", flush=True)
        raise Stopped(f"stopped by {reason}")
      if step == 3: print("talking", flush=True)
cli.run(distributed.on_every_process(main))
"""
EVALUATION = """
import pathlib, time
from moe_jax import cli
from moe_jax.cluster import start as distributed
from moe_jax.data import load_dataset
from moe_jax.training.loop import Run
from tests.cluster.test_two_processes import evaluated
distributed.define_flags()
class Slow(Run):
  def evaluate(self, state, step=None):
    def evaluate_batch(*args):
      print("talking", flush=True)
      time.sleep(0.2)
      return step(*args)
    return super().evaluate(state, evaluate_batch)
def main(argv):
  Slow(evaluated(), load_dataset(evaluated().data), pathlib.Path(__file__).parent / "run").train()
cli.run(distributed.on_every_process(main))
"""
LAST_SAVE = """
import time
from moe_jax import cli
from moe_jax.cluster import start as distributed
from moe_jax.errors import Stopped
distributed.define_flags()
def main(argv):
  import jax
  from moe_jax.training.stops import Stops
  with Stops() as stops:
    for step in range(3):
      assert not stops.reached()
    print("talking", flush=True)
    while jax.process_index() and not stops._agreement.reason:  # the last save; process 0 is done with its part
      time.sleep(0.01)
    if reason := stops.ended():
      print(f"saved {step}", flush=True)
      raise Stopped(f"stopped by {reason}")
cli.run(distributed.on_every_process(main))
"""
GONE = (
  r"error: process {} of 2.* died, was killed or hangs \(process {}: {}.*continues from the last checkpoint\n"
)
LOST = r"error: process 1 of 2 has lost process 0 at 127.0.0.1:\d+, or counts as gone; .* from the last checkpoint\n"


@pytest.fixture
def talk(tmp_path):
  """Starts a pair that does nothing but talk to each other."""
  script = tmp_path / "talk.py"
  script.write_text(TALK)
  return lambda **options: Pair([str(script), "--heartbeat_timeout=6"], tmp_path, **options)


@pytest.mark.parametrize(
  ("process", "sent", "status", "told"),
  [
    (1, signal.SIGSTOP, 1, GONE.format(1, 0, "no heartbeat for 6 s")),
    (1, signal.SIGINT, 130, r"process 1 of 2 \(.*\) stopped: stopped by SIGINT; .*\n"),
    # JAX's abort may be quicker than our thread. Both are one line.
    (0, signal.SIGKILL, None, "^talking\n(" + GONE.format(0, 1, "") + "|" + LOST + ")$"),
  ],
  ids=["frozen", "interrupted", "process 0 killed"],
)
def test_the_other_ends_in_bounded_time_and_says_why(talk, process, sent, status, told):
  with talk() as pair:
    pair.wait_until(lambda: all("talking" in pair.output(i) for i in (0, 1)), SLOW, "talk")
    started = time.monotonic()
    pair.processes[process].send_signal(sent)
    ended = pair.ends(1 - process, SLOW)
    assert time.monotonic() - started < BOUND
    for _ in range(100):  # the line in place of JAX's page comes from a process that outlives the abort
      if found := re.search(told, pair.output(1 - process)):
        break
      time.sleep(0.1)
    assert found, pair.output(1 - process)
    assert ended == status if status else ended != 0
    assert sent != signal.SIGINT or pair.ends(process, SLOW) == status


@pytest.mark.parametrize("source", [ASKED, LAST_SAVE], ids=["between steps", "in the last save"])
def test_a_signal_to_one_stops_both_after_the_same_step(source, tmp_path):
  script = tmp_path / "asked.py"
  script.write_text(source)
  with Pair([str(script), "--heartbeat_timeout=20"], tmp_path) as pair:
    pair.wait_until(lambda: all("talking" in pair.output(i) for i in (0, 1)), SLOW, "talk")
    pair.processes[1].send_signal(signal.SIGTERM)
    assert [pair.ends(i, SLOW) for i in (0, 1)] == [75, 75]
    outputs = [pair.output(i) for i in (0, 1)]
  steps = [re.findall(r"saved (\d+)", output) for output in outputs]
  assert len(steps[0]) == 1 and steps[0] == steps[1]
  assert [output.count("stopped by SIGTERM") for output in outputs] == [1, 0]


def evaluated() -> Config:
  """The configuration of a run that evaluates a hundred batches after its second step."""
  few = {"num_steps": 3, "eval_every": 2, "eval_batches": 100, "checkpoint_every": 0}
  return tiny.change(_config(BOTH), **few, checkpoint_minutes=0.0)


def test_both_leave_an_evaluation_at_the_same_batch(dataset, tmp_path):
  """And save the step before it. The next process evaluates."""
  script = tmp_path / "evaluation.py"
  script.write_text(EVALUATION)
  with Pair([str(script), "--heartbeat_timeout=20"], tmp_path) as pair:
    pair.wait_until(lambda: all("talking" in pair.output(i) for i in (0, 1)), SLOW, "talk")
    pair.processes[1].send_signal(signal.SIGTERM)
    assert [pair.ends(i, SLOW) for i in (0, 1)] == [75, 75]
    outputs = [pair.output(i) for i in (0, 1)]
  batches = [output.count("talking") for output in outputs]
  assert batches[0] == batches[1] < 100
  assert "stopped by SIGTERM; step 2 of 3 is saved" in outputs[0]
  progress = tiny.StopsAt(0)
  Run(evaluated(), dataset, tmp_path / "run", progress).train()
  assert "continues from step 2" in progress.notes[0]
  lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
  assert [(line["step"], "eval_nll" in line) for line in lines] == [
    (1, False),
    (2, False),
    (2, True),
    (3, False),
  ]


def test_processes_that_do_not_fit_end_with_one_line(talk):
  with contextlib.ExitStack() as stack:  # all at the same time
    alone = [stack.enter_context(talk(ids=(i,), timeout=1.5)) for i in (0, 1)]
    both = stack.enter_context(talk(own={1: "--verbosity=-1"}))
    pairs = [(alone[0], 0), (alone[1], 1), (both, 0), (both, 1)]
    assert [pair.ends(i, SLOW) for pair, i in pairs] == [2] * 4
    lines = [pair.output(i) for pair, i in pairs]
  expected = [
    r"--num_processes=2: not all processes joined at 127.0.0.1:\d+ within 1.5 s .*; this is process 0, .*",
    r"--coordinator_address=\S+: process 1 did not find process 0 within 1.5 s .*",
    r"process 1 of 2 \(.*\) stopped: all processes must be started with the same flags and the same code: .*",
    r".* the same code: process 1 has --verbosity=-1, process 0 has none of that",
  ]
  for line, pattern in zip(lines, expected, strict=True):
    assert re.fullmatch(f"error: {pattern}\n", line)
