"""Disturbs runs at random, starts them again, and compares their ends with that of a run that nothing disturbed.

  python scripts/soak.py --seed=0 --minutes=10
  python scripts/soak.py --seed=1 --faults=100 --folder=runs/soak

One small comparison of one arm is trained to its end without faults. Then it is trained again and again, in new folders, with
faults drawn from --seed: kill -9, SIGTERM, Ctrl-C, files that are cut, flipped or removed, files that cannot be written,
a second start at the same time, times of files (also those in names) that are a day off, a damaged cache of the corpus.
After each, the same command is started again. At the end, parameters, optimizer, result, metrics, TensorBoard's events and
recorded router logits must be those of the undisturbed run, bit by bit. A start may also end with one line that says what to
do; a traceback, a hang or another end is a failure, and the exit status is then 1. On one machine with several processes:
scripts/soak_cluster.py.
"""

import collections
import contextlib
import dataclasses
import io
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable

from absl import flags
from soak_start import ARM, LIMIT, Failed, Start, move_events, recorded, remedy, shown_events

from moe_jax import cli
from moe_jax.comparison.folder import ComparisonFolder
from moe_jax.config import Config, DataConfig, ModelConfig, MoEConfig, TrainConfig
from moe_jax.training.metric_writer import EVENTS, read_lines

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "the", "dog", "ran", "after", "it", "until", "dark"]

_SEED = flags.DEFINE_integer("seed", 0, "of the faults")
_MINUTES = flags.DEFINE_float("minutes", 0.0, "how long to go on; 0: until --faults", lower_bound=0)
_FAULTS = flags.DEFINE_integer("faults", 0, "how many faults; 0: until --minutes", lower_bound=0)
_FOLDER = flags.DEFINE_string("folder", "runs/soak", "for the runs; must be new, or that of an earlier soak")
_STEPS = flags.DEFINE_integer("steps", 240, "of a run; a checkpoint is saved every 20", lower_bound=40)
_BESIDE = flags.DEFINE_bool(
  "beside",
  False,
  "runs wait at each save until the process beside them has written it; else these short runs write almost all themselves",
)
_KEEP = flags.DEFINE_bool("keep", False, "keep the folders of runs that ended well, too")


def config(texts: pathlib.Path, data: pathlib.Path) -> Config:
  model = ModelConfig(num_layers=1, model_dim=16, num_heads=2, num_kv_heads=1, head_dim=8)
  moe = MoEConfig(num_experts=4, num_experts_per_token=2, expert_dim=16, balancers="loss_free_bias:0.01")
  return Config(
    model=dataclasses.replace(model, moe=moe),
    data=DataConfig(
      dataset="text_folder",
      text_folder=str(texts),
      data_dir=str(data),
      tokenizer="bpe:300",
      sequence_length=16,
      batch_size=8,
    ),
    train=TrainConfig(
      num_steps=_STEPS.value, log_every=1, checkpoint_every=20, eval_batches=2, record_router_logits=1
    ),
  )


class Soak:
  """The undisturbed run, and the counts."""

  def __init__(self, folder: pathlib.Path, seed: int):
    self.folder, self.random = folder, random.Random(seed)
    self.counts: collections.Counter[str] = collections.Counter()
    self.starts, self.ends, self.refusals = 0, 0, 0
    self.texts = folder / "texts"
    self._write_texts()
    self.config = config(self.texts, folder / "data")
    self.whole = self._run_folder(folder / "whole")
    if not (self.whole / "result.json").exists():
      self.expect(self.start(folder / "whole"), 0)

  def _write_texts(self) -> None:
    words = random.Random(0)
    for domain in ("one", "two"):
      (self.texts / domain).mkdir(parents=True, exist_ok=True)
      for i in range(6):
        (self.texts / domain / f"{i}.txt").write_text(" ".join(words.choices(WORDS, k=400)) + "\n")

  def start(self, output_dir: pathlib.Path, largest_file: int = 0) -> "Start":
    """Starts the comparison in a process of its own, whose output goes to a file beside its folder."""
    self.starts += 1
    log = pathlib.Path(f"{output_dir}_{self.starts}.txt")
    return Start(self.config, output_dir, log, largest_file, _BESIDE.value)

  def expect(self, process: Start, *allowed: int) -> None:
    """Waits, and raises `Failed` for an end that is none of `allowed`, and for a traceback."""
    status, said = process.wait(), process.log.read_text(errors="replace")
    errors = sum(line.startswith("error: ") for line in said.splitlines())
    if status not in allowed or "Traceback" in said or errors > 1:
      raise Failed(f"a start ended with status {status}, expected {allowed}:\n{said[-3000:]}")

  def _run_folder(self, output_dir: pathlib.Path) -> pathlib.Path:
    return output_dir / "arms" / ARM / "seed_0"

  def step(self, output_dir: pathlib.Path) -> int:
    """The last step in metrics.jsonl."""
    try:
      lines = (self._run_folder(output_dir) / "metrics.jsonl").read_text(errors="replace").splitlines()
      return max((json.loads(line)["step"] for line in lines[-2:-1]), default=0)
    except (OSError, ValueError, KeyError, TypeError):
      return 0

  def one_run(self, number: int, more: Callable[[], bool]) -> None:
    """Disturbs a run until it has reached its end, and compares."""
    output_dir = self.folder / f"seed_{_SEED.value}_run_{number}"
    shutil.rmtree(output_dir, ignore_errors=True)
    spoilt: set[str] = set()
    while more():
      fault = self.random.choice(list(FAULTS))
      until = self.random.uniform(self.step(output_dir), _STEPS.value)
      process = self.start(output_dir, largest_file=6000 if fault == "full" else 0)
      deadline = time.monotonic() + LIMIT
      while process.poll() is None and self.step(output_dir) < until and time.monotonic() < deadline:
        time.sleep(0.02)
      if time.monotonic() >= deadline:
        process.kill()
        raise Failed(f"{output_dir}: a start hangs")
      if process.poll() == 0:
        break
      self.counts[fault] += 1
      spoilt |= FAULTS[fault](self, process, output_dir)
    self._finish(output_dir)
    self._compare(output_dir, spoilt)
    self.ends += 1
    if not _KEEP.value:
      shutil.rmtree(output_dir)

  def _finish(self, output_dir: pathlib.Path) -> None:
    for _ in range(3):
      process = self.start(output_dir)
      self.expect(process, 0, 2)
      if process.status == 0:
        return
      self.refused(process)
    raise Failed(f"{output_dir}: does not start again; see {process.log}")

  def refused(self, process: Start) -> None:
    self.refusals += remedy(process.log.read_text(errors="replace")) is not None

  def _compare(self, output_dir: pathlib.Path, spoilt: set[str]) -> None:
    own = self._run_folder(output_dir)
    results = [json.loads((folder / "result.json").read_text()) for folder in (self.whole, own)]
    parts = {"validation": [r["validation"] for r in results]}
    parts |= {f"training {k}": [r["training"][k] for r in results] for k in ("loss", "max_vio", "tail_steps")}
    saved = [folder / f"checkpoints/{_STEPS.value}/extra/metadata" for folder in (self.whole, own)]
    parts["arrays of the last checkpoint"] = [json.loads(path.read_text())["arrays"] for path in saved]
    metrics = [self._metrics(folder) for folder in (self.whole, own)]
    parts["metrics"] = metrics
    parts["events"] = [
      shown_events(folder / "tensorboard") for folder in (self.whole, own) if "events" not in spoilt
    ]
    parts["router logits"] = [
      recorded(folder) for folder in (self.whole, own) if "router logits" not in spoilt
    ]
    for name in spoilt:
      del parts[name]
    has_hole = len(metrics[0]) != len(metrics[1])  # a flipped digit shows nowhere, but a hole does
    if "metrics" in spoilt and has_hole:
      parts["note of lost lines"] = [True, self._notes_holes(output_dir)]
    for name, (expected, found) in parts.items():
      if found != expected:
        raise Failed(f"{output_dir}: other {name} than the undisturbed run")

  def _metrics(self, folder: pathlib.Path) -> list[dict]:
    lines, _ = read_lines(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for _, line in lines]

  def _notes_holes(self, output_dir: pathlib.Path) -> bool:
    """Whether a report of the run says that lines of metrics.jsonl are lost."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
      ComparisonFolder(output_dir).merge_metrics([(ARM, 0)])
    return "lines are there" in said.getvalue()

  # Faults: (process, folder) -> what they may have lost a part of: metrics, events, router logits.

  def kill(self, process: Start, output_dir: pathlib.Path) -> set[str]:
    process.kill()
    return set()

  def ask(self, process: Start, output_dir: pathlib.Path) -> set[str]:
    process.send_signal(self.random.choice([signal.SIGTERM, signal.SIGINT, signal.SIGHUP]))
    # Before the comparison listens, and after its end.
    unsaved = (130, -signal.SIGTERM, -signal.SIGHUP)
    self.expect(process, 0, 75, *unsaved)
    return set()

  def full(self, process: Start, output_dir: pathlib.Path) -> set[str]:
    self.expect(process, 0, 2)
    return set()

  def second(self, process: Start, output_dir: pathlib.Path) -> set[str]:
    self.expect(self.start(output_dir), 0, 2)  # 0: the first had ended meanwhile
    self.expect(process, 0)
    return set()

  def later(self, process: Start, output_dir: pathlib.Path) -> set[str]:
    self.kill(process, output_dir)
    for path in output_dir.rglob("*"):
      day = time.time() + self.random.choice([-1, 1]) * 86_400
      os.utime(path, (day, day))
    move_events(output_dir, self.random.choice([-1, 1]) * 86_400)
    return set()

  def cache(self, process: Start, output_dir: pathlib.Path) -> set[str]:
    self.kill(process, output_dir)
    self._damage(path for path in (self.folder / "data").rglob("*") if "damaged" not in path.parts)
    return set()

  def damage(self, process: Start, output_dir: pathlib.Path) -> set[str]:
    self.kill(process, output_dir)
    paths = [path for path in output_dir.rglob("*") if "damaged" not in path.parts]
    if self.random.random() < 0.7:  # mostly what matters most
      paths = [path for path in paths if "checkpoints" in path.parts] or paths
    damaged = self._damage(paths)
    process = self.start(output_dir)
    deadline = time.monotonic() + LIMIT
    before = self.step(output_dir)
    while process.poll() is None and self.step(output_dir) <= before and time.monotonic() < deadline:
      time.sleep(0.02)
    if process.poll() is not None:
      self.expect(process, 0, 2)
    if process.status == 2:
      self.refused(process)
    self.kill(process, output_dir)
    of = {"metrics": "metrics.jsonl", "events": EVENTS, "router logits": ("steps_", "header.json")}
    return {part for part, begins in of.items() if damaged and damaged.name.startswith(begins)}

  def _damage(self, paths) -> pathlib.Path | None:
    files = sorted(path for path in paths if path.is_file() and path.stat().st_size)
    if not files:
      return None
    path = self.random.choice(files)
    data = bytearray(path.read_bytes())
    how = self.random.choice(["cut", "flip", "remove"])
    if how == "remove":
      path.unlink()
    elif how == "cut":
      path.write_bytes(data[: self.random.randrange(len(data))])
    else:
      data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
      path.write_bytes(data)
    with open(f"{self.folder}/faults.txt", "a") as log:
      log.write(f"{how} {path.relative_to(self.folder)}\n")
    return path


FAULTS = {
  "kill -9": Soak.kill,
  "SIGTERM, SIGHUP or Ctrl-C": Soak.ask,
  "damaged file": Soak.damage,
  "full": Soak.full,
  "second start": Soak.second,
  "times of files a day off": Soak.later,
  "damaged cache": Soak.cache,
}


def main(argv: list[str]) -> None:
  del argv
  minutes, most = _MINUTES.value, _FAULTS.value
  minutes = minutes or (0.0 if most else 10.0)
  deadline = time.monotonic() + 60 * minutes
  folder = pathlib.Path(_FOLDER.value).absolute()
  folder.mkdir(parents=True, exist_ok=True)
  soak = Soak(folder, _SEED.value)

  def more() -> bool:
    return (not most or soak.counts.total() < most) and (not minutes or time.monotonic() < deadline)

  failure = None
  try:
    number = 0
    while more():
      soak.one_run(number, more)
      number += 1
  except Failed as error:
    failure = error
  for name in FAULTS:
    print(f"{name}: {soak.counts[name]}")
  print(
    f"faults: {soak.counts.total()}, starts: {soak.starts}, starts refused with one line: {soak.refusals}"
  )
  print(f"runs whose end equals that of the undisturbed run: {soak.ends}")
  if failure:
    print(f"FAILED: {failure}")
    sys.exit(1)


if __name__ == "__main__":
  cli.run(main)
