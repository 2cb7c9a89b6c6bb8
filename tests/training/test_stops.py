"""A run that is asked to stop finishes its step, saves it, says so, and continues to the same numbers."""

import contextlib
import itertools
import os
import pathlib
import signal
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
from jax._src import distributed

from moe_jax import locks
from moe_jax.cluster import signals, watch
from moe_jax.comparison import comparison
from moe_jax.data import load_dataset
from moe_jax.errors import InputError, Stopped
from moe_jax.training import stops
from moe_jax.training.checkpoint import Checkpoints
from moe_jax.training.loop import Run
from moe_jax.training.metric_writer import read_jsonl
from moe_jax.training.stops import Stops
from tests import tiny
from tests.training.test_faults import tensorboard_events

CONFIG = tiny.change(tiny.CONFIG, num_steps=6, eval_batches=2, num_layers=1)


@pytest.fixture(scope="module")
def dataset():
  return load_dataset(CONFIG.data)


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
  return Run(CONFIG, dataset, tmp_path_factory.mktemp("finished"), label="arm").train()


class Sends(tiny.StopsAt):
  """Stands for the progress display of a run that gets a signal in a step."""

  def __init__(self, step, number):
    super().__init__(step)
    self.number = number

  def update(self, step, *numbers):
    if step == self.step:
      os.kill(os.getpid(), self.number)
      time.sleep(0.2)  # a step takes longer than a signal


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_saves_the_step_and_the_run_continues(number, dataset, finished, tmp_path):
  """By default, without --checkpoint_every."""
  before = [signal.getsignal(n) for n in signals.SIGNALS]
  with pytest.raises(
    Stopped, match=rf"stopped by {number.name}; step 3 of 6 is saved in .*same command continues"
  ):
    Run(CONFIG, dataset, tmp_path, Sends(2, number), label="arm").train()
  assert [signal.getsignal(n) for n in signals.SIGNALS] == before
  progress = tiny.StopsAt(0)
  result = Run(CONFIG, dataset, tmp_path, progress, label="arm").train()
  assert progress.notes == [": continues from step 3"] or "continues from step 3" in progress.notes[0]
  assert result["validation"] == finished["validation"]
  assert result["training"]["loss"] == finished["training"]["loss"]


def test_a_time_limit_and_checkpoints_by_time(dataset, tmp_path, monkeypatch):
  saved, save = [], stops.Stops.saved
  monkeypatch.setattr(stops.Stops, "saved", lambda self: (saved.append(1), save(self)))
  monkeypatch.setattr(stops, "FIRST_SAVE", 0.0)
  config = tiny.change(CONFIG, checkpoint_minutes=1e-9)
  Run(config, dataset, tmp_path / "often").train()
  assert len(saved) == CONFIG.train.num_steps
  saved.clear()
  monkeypatch.setattr(stops, "FIRST_SAVE", 1e6)
  Run(tiny.change(CONFIG, checkpoint_minutes=5.0), dataset, tmp_path / "rarely").train()
  assert len(saved) == 1
  with pytest.raises(Stopped, match=r"stopped by --max_minutes=1e-09; step [12] of 6 is saved"):
    Run(tiny.change(CONFIG, max_minutes=1e-9), dataset, tmp_path / "limited").train()
  saved.clear()
  monkeypatch.setattr(stops, "FIRST_SAVE", 0.0)
  # The clock is asked at each step, not only at lines of metrics.
  Run(tiny.change(config, log_every=100), dataset, tmp_path / "silent").train()
  assert len(saved) == CONFIG.train.num_steps
  ticks = itertools.count()  # seconds: one passes between two looks
  monkeypatch.setattr(stops, "time", types.SimpleNamespace(monotonic=lambda: float(next(ticks))))
  monkeypatch.setattr(stops, "_started", 0.0)
  limited = tiny.change(CONFIG, max_minutes=2.5 / 60, checkpoint_minutes=0.0, log_every=100)
  with pytest.raises(Stopped, match=r"stopped by --max_minutes=0.0416667; step 3 of 6 is saved"):
    Run(limited, dataset, tmp_path / "asked each step").train()


@pytest.mark.parametrize("num_steps", [6, 4], ids=["last step", "its stop callback"])
def test_a_signal_while_the_last_step_is_saved_counts(num_steps, dataset, tmp_path, monkeypatch):
  """Else a comparison would go on to its next run, which nobody has told."""
  save = Checkpoints.save

  def signalled(self, step, *args, **more):
    save(self, step, *args, **more)
    if step == num_steps:
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(0.2)

  config = tiny.change(CONFIG, eval_every=2 if num_steps < CONFIG.train.num_steps else 0)
  reached = lambda validation: config.train.eval_every > 0 and asked.append(1) is None and len(asked) != 1
  asked = []
  with monkeypatch.context() as patch:
    patch.setattr(Checkpoints, "save", signalled)
    with pytest.raises(Stopped, match=rf"stopped by SIGTERM; step {num_steps} of 6 is saved"):
      Run(config, dataset, tmp_path, label="arm", stop=reached).train()
  assert not (tmp_path / "result.json").exists()
  assert Run(config, dataset, tmp_path, label="arm", stop=reached).train()["num_steps"] == num_steps


@pytest.mark.parametrize("number", signals.SIGNALS, ids=lambda n: n.name)
def test_a_second_signal_ends_at_once(number, monkeypatch):
  """Also where the main thread waits for a save, and whichever signal it is."""
  ends = []
  monkeypatch.setattr(stops.os, "_exit", ends.append)
  monkeypatch.setattr(stops.abort, "write", ends.append)
  with stops.Stops() as listener:
    assert listener.reached() == ""
    os.kill(os.getpid(), number)
    time.sleep(0.1)
    assert ends == [] and listener.reached() == number.name
    os.kill(os.getpid(), number)
    time.sleep(0.1)
    assert ends == [f"error: a second signal, {number.name}: ended without saving", 128 + number]


def test_what_is_one_line_already_stays_it():
  error = RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1073741824 bytes")
  assert str(stops.in_words(error, "mine", "runs/a")).startswith("mine: out of memory (RESOURCE_EXHAUSTED")
  assert stops.in_words(InputError(f"a checkpoint cannot be read now: {error}"), "mine", "runs/a") is None


@pytest.fixture
def ended(monkeypatch):
  """(line, status) with which the process would have ended."""
  found = []
  monkeypatch.setattr(watch, "end", lambda line, status: found.append((line, status)))
  return found


def test_a_signal_around_runs_ends_at_once(dataset, ended, tmp_path, monkeypatch):
  """While data are loaded, in the final evaluation, between two runs, and while the report is written."""
  before = [signal.getsignal(n) for n in signals.SIGNALS]

  def gets(function, number):
    def wrapped(*args, **kwargs):
      seen = len(ended)
      os.kill(os.getpid(), number)
      deadline = time.monotonic() + 20
      while len(ended) == seen and time.monotonic() < deadline:
        time.sleep(0.01)
      places.append(function.__name__)
      return function(*args, **kwargs)

    return wrapped

  places = []
  monkeypatch.setattr(comparison, "load_dataset", gets(comparison.load_dataset, signal.SIGTERM))
  monkeypatch.setattr(Run, "evaluate", gets(Run.evaluate, signal.SIGHUP))
  monkeypatch.setattr(comparison, "write_report", gets(comparison.write_report, signal.SIGTERM))
  arm = {"balancers": CONFIG.model.moe.balancers}
  compared = comparison.Comparison({"a": arm}, [0, 1], CONFIG, tmp_path)
  compared.report(compared.run(), title="t", question="q", command="c")
  assert places == ["load_dataset", "evaluate", "evaluate", "write_report"]
  line = "stopped by {}; what is finished is kept, and the same command continues"
  names = ["SIGTERM", "SIGHUP", "SIGHUP", "SIGTERM"]
  assert ended == [(line.format(name), 75) for name in names]
  assert [signal.getsignal(n) for n in signals.SIGNALS] == before


WAITING = """
import sys, time
from moe_jax import cli
from moe_jax.cluster.signals import Between
from moe_jax.training.stops import Stops

def main(argv):
  with Between() if argv[1] == "between" else Stops():
    print("ready", flush=True)
    for _ in range(60):
      try:
        time.sleep(1)
      except KeyboardInterrupt:  # Python drops one that comes while JAX's callback of the garbage collector runs
        pass

cli.run(main, takes_arguments=True)
"""


@pytest.mark.parametrize(
  ("number", "status"),
  [(signal.SIGTERM, 75), (signal.SIGHUP, 75), (signal.SIGINT, 130)],
  ids=lambda n: str(n),
)
@pytest.mark.parametrize("where", ["between", "before the first step"])
def test_a_signal_to_a_command_that_trains_nothing_is_one_line(number, status, where):
  command = [sys.executable, "-c", WAITING, where]
  with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.wait(30) == status
    then = "; what is finished is kept, and" if where == "between" else " before the first step;"
    assert process.stderr.read() == f"stopped by {number.name}{then} the same command continues\n"


def test_ctrl_c_in_a_notebook_is_pythons():
  with signals.Between():
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler and not signals.in_program()
  with signals.Between(of_program=True):
    with signals.Between():
      assert signals.in_program()
    assert signals.in_program()


CHILD = """
import pathlib, sys, time
from moe_jax import cli
from moe_jax.data import load_dataset
from moe_jax.training.loop import Run
from tests import tiny
from tests.training.test_faults import tensorboard_events
from tests.training.test_stops import CONFIG

class Waits(tiny.StopsAt):
  def update(self, step, *numbers):
    if step == 2:
      print("ready", flush=True)
      while not pathlib.Path(sys.argv[1], "go").exists():
        time.sleep(0.05)

def main(argv):
  Run(CONFIG, load_dataset(CONFIG.data), argv[1], Waits(0), label="arm").train()

cli.run(main, takes_arguments=True)
"""


@contextlib.contextmanager
def child(folder):
  """A process that trains in the folder, in step 2, where it waits for a file named go."""
  with subprocess.Popen(
    [sys.executable, "-c", CHILD, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  ) as process:
    try:
      assert process.stdout.readline() == "ready\n", process.stderr.read()[-2000:]
      yield process
    finally:
      process.kill()


def test_one_process_has_a_folder_until_it_ends_or_is_gone(dataset, finished, tmp_path):
  """The first is asked to stop once, the second twice, which ends it at once."""
  asked, gone = tmp_path / "asked", tmp_path / "gone"
  with child(asked) as process, child(gone) as other:
    line = rf"{asked}: in use by process {process.pid} on \S+ since \d{{4}}-.*; wait for it or stop it"
    with pytest.raises(InputError, match=line):
      Run(CONFIG, dataset, asked).train()
    process.send_signal(signal.SIGTERM)
    other.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is other.poll() is None  # they are within their steps
    (asked / "go").touch()
    other.send_signal(signal.SIGTERM)
    assert (process.wait(30), other.wait(5)) == (75, 128 + signal.SIGTERM)
    said, said_at_once = process.stderr.read(), other.stderr.read()
  assert said.startswith("arm: stopped by SIGTERM; step 3 of 6 is saved") and said.count("\n") == 1
  assert said_at_once == "error: a second signal, SIGTERM: ended without saving\n"
  for folder in (asked, gone):
    assert Run(CONFIG, dataset, folder, label="arm").train()["validation"] == finished["validation"]
    assert (folder / locks.LOCK).read_text() == ""


def test_a_run_that_is_asked_saves_before_it_evaluates(dataset, tmp_path):
  """The time that is left may be shorter than an evaluation. The next process evaluates, and the lines are the same.

  So are they, and what TensorBoard shows, if that one is killed before it saves, and a third one evaluates again.
  """
  config = tiny.change(CONFIG, eval_every=2, tensorboard=True)
  evaluated = []

  class Evaluates(Run):
    def evaluate(self, state, step=None):
      evaluated.append(int(state.step))
      return super().evaluate(state, step)

  Evaluates(config, dataset, tmp_path / "whole", label="arm").train()
  assert evaluated == [2, 4, 6]
  evaluated.clear()
  for asked in (1, 3):
    with pytest.raises(Stopped, match=f"step {asked + 1} of 6 is saved"):
      Evaluates(config, dataset, tmp_path / "run", Sends(asked, signal.SIGTERM), label="arm").train()
    evaluated.append("stopped")
    if asked == 1:
      with pytest.raises(KeyboardInterrupt):
        Evaluates(config, dataset, tmp_path / "run", tiny.StopsAt(3), label="arm").train()
      evaluated.append("killed")
  assert Evaluates(config, dataset, tmp_path / "run", label="arm").train()["metric_lines"] == 8
  assert evaluated == ["stopped", 2, "killed", 2, "stopped", 4, 6]
  lines = [read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("whole", "run")]
  for line in [*lines[0], *lines[1]]:
    line.pop("tokens_per_second", None)
  assert lines[0] == lines[1]
  shown = [_shown(tmp_path / name / "tensorboard") for name in ("whole", "run")]
  assert shown[0] == shown[1] and [step for step, _ in shown[0]["eval_nll"]] == [2, 4]


@pytest.mark.parametrize("asked", ["a signal", "the end of its time"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_run_that_is_asked_leaves_the_evaluation(asked, batch, dataset, tmp_path, monkeypatch):
  """A validation set may take longer than the time that is left. Nothing more is trained, and the next process evaluates."""
  config = tiny.change(CONFIG, eval_every=2, max_minutes=0.0 if asked == "a signal" else 1e6)
  evaluated = []

  class Asked(Run):
    def evaluate(self, state, step=None):
      def evaluate_batch(*args):
        evaluated.append(int(state.step))
        if evaluated.count(4) == batch and asked == "a signal":
          os.kill(os.getpid(), signal.SIGTERM)
          time.sleep(0.2)
        elif evaluated.count(4) == batch:
          patch.setattr(stops, "_started", -1e12)
        return (step or self.steps.evaluate)(*args)

      return super().evaluate(state, evaluate_batch)

  whole = Run(config, dataset, tmp_path / "whole", label="arm").train()
  reason = "SIGTERM" if asked == "a signal" else r"--max_minutes=1e\+06"
  with monkeypatch.context() as patch, pytest.raises(Stopped, match=f"by {reason}; step 4 of 6 is saved"):
    Asked(config, dataset, tmp_path / "run", label="arm").train()
  assert evaluated == [2, 2, *[4] * batch]
  result = Run(config, dataset, tmp_path / "run", label="arm").train()
  same = ("validation", "metric_lines", "num_steps")
  assert [result[name] for name in same] == [whole[name] for name in same]
  assert result["training"]["loss"] == whole["training"]["loss"]
  lines = [read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("whole", "run")]
  for line in [*lines[0], *lines[1]]:
    line.pop("tokens_per_second", None)
  assert lines[0] == lines[1]


def test_however_short_its_time_is_each_start_evaluates_and_trains(dataset, tmp_path, monkeypatch):
  """Else a run whose evaluation takes longer than `--max_minutes` would never end. A signal leaves that evaluation, too."""
  config = tiny.change(CONFIG, eval_every=2, num_steps=4, max_minutes=1e-9)
  steps = []
  while not steps or steps[-1] < 4:
    with pytest.raises(Stopped) as stopped:
      Run(config, dataset, tmp_path).train()
    steps.append(int(str(stopped.value).split("; step ")[1].split()[0]))
    if steps[-1] == 2:
      with monkeypatch.context() as patch, pytest.raises(Stopped, match="by SIGTERM; step 2 of 4 is saved"):
        patch.setattr(Stops, "told", lambda self: "SIGTERM")  # of several processes; one ends at once
        Run(config, dataset, tmp_path).train()
  assert steps == [1, 2, 3, 4]
  assert [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl") if "eval_nll" in line] == [2]


def _shown(folder: pathlib.Path) -> dict[str, list]:
  """(step, value) of each tag, as TensorBoard reads the files: a later one forgets what comes after its start."""
  shown: dict[str, list] = {}
  for event in (event for path in sorted(folder.iterdir()) for event in tensorboard_events(path)):
    if event.HasField("session_log"):
      shown = {tag: [(s, x) for s, x in found if s < event.step] for tag, found in shown.items()}
    for value in event.summary.value:
      shown.setdefault(value.tag, []).append((event.step, str(value)))
  shown.pop("tokens_per_second", None)
  return shown


class Notified:
  """Stands for JAX's preemption service after a notice, on which all processes agree at step 3."""

  def reached_sync_point(self, step):
    return step == 3


def test_a_notice_of_jax_stops_a_run_in_a_thread(monkeypatch):
  """Only where another program has started JAX's service; without it, nobody is asked."""
  with Stops() as listener:
    assert [listener.reached() for _ in range(3)] == ["", "", ""]
    listener.close()
  monkeypatch.setattr(distributed.global_state, "client", object())
  monkeypatch.setattr(distributed.global_state, "preemption_sync_manager", Notified())

  def train():
    with Stops() as listener:
      return [listener.reached() for _ in range(3)]

  with ThreadPoolExecutor(1) as pool:
    assert pool.submit(train).result() == ["", "", "a preemption notice"]
