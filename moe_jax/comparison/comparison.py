"""A comparison trains several arms on the same batches, with several seeds. It can be resumed."""

import dataclasses
import json
import os
import pathlib
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console

from moe_jax import sharding
from moe_jax.cluster import processes
from moe_jax.comparison import report
from moe_jax.comparison.arms import Arm, value_of, with_arm
from moe_jax.config import Config
from moe_jax.config.plain import fingerprint, to_plain
from moe_jax.data import load_dataset
from moe_jax.errors import InputError
from moe_jax.registry import Method
from moe_jax.training.compiled import check_run
from moe_jax.training.loop import Run
from moe_jax.training.progress import TrainingProgress

Result = dict[str, Any]


class Comparison:
  """Trains every arm with every seed in `output_dir`, and keeps the runs that an earlier call finished.

  A seed fixes the initial parameters, the order of the batches and all random draws. All arms share them, so
  differences between arms are paired by seed. With several processes, all processes make the same calls. Only
  process 0 prints and writes.

  Args:
    arms: for each arm, its name and the fields in which it differs from `config`. Methods may be names,
      functions or classes. The first arm is the baseline.
    seeds: the seeds of the runs.
    config: the configuration of every run. Its `seed` and `data_seed` are replaced by the seed of the run.
    output_dir: a new folder, or that of an earlier comparison with the same configuration.

  Raises:
    InputError: if a field is wrong, or if the folder has results of another configuration or of other code.
      It is raised before any training.
  """

  def __init__(
    self,
    arms: Mapping[str, Arm],
    seeds: Iterable[int],
    config: Config,
    output_dir: str | os.PathLike[str],
  ):
    mesh = sharding.make_mesh(config.check().mesh)
    self.seeds = list(seeds)
    self.config = _with_seed(config, 0)  # the seed is of the run, not of the comparison
    # Resolved here, once: a method that is defined anew later is another arm.
    self.configs = {name: check_run(with_arm(self.config, arm), mesh) for name, arm in arms.items()}
    self.arms = {name: _described(arm, self.configs[name]) for name, arm in arms.items()}
    self.folder = pathlib.Path(output_dir)
    self.console = Console(quiet=not processes.is_first())
    if processes.is_first():  # where it fails, the others are stopped with its message
      self._check_folder()

  def run(self) -> list[Result]:
    """Trains the runs that are not finished.

    Returns a result for each arm and seed, in the order of the arms.
    """
    dataset = load_dataset(self.config.data)
    self._describe(dataset.info)
    processes.check_agree(
      dataset.info.fingerprint, "--dataset: fingerprint of the text", "all processes must read the same text"
    )
    with processes.first_writes("claim") as mine:
      if mine:
        self._check_fingerprint(dataset.info.fingerprint)
        self._claim_folder()
    processes.check_agree(
      self._sees_claim(),
      f"--output_dir={self.folder}: holds the config.json of process 0",
      "the folder must be on a file system that all processes share",
    )
    todo = processes.from_first(
      [(arm, seed) for seed in self.seeds for arm in self.arms if not self._result_file(arm, seed).exists()]
    )
    kept = len(self.arms) * len(self.seeds) - len(todo)
    if kept:
      self.console.print(f"{kept} of {kept + len(todo)} runs in {self.folder} are done and kept")
    with TrainingProgress(len(todo) * self.config.train.num_steps, self.console) as progress:
      for arm, seed in todo:
        folder = self._run_folder(arm, seed)
        config = _with_seed(self.configs[arm], seed)
        Run(config, dataset, folder, progress, label=arm, show=f"{arm} seed {seed}").train()
    processes.wait_for_all("results")
    return [json.loads(self._result_file(arm, seed).read_text()) for arm in self.arms for seed in self.seeds]

  def report(
    self,
    results: list[Result],
    *,
    title: str,
    question: str,
    command: str,
    notes: Sequence[str] = (),
    varies: Sequence[str] = (),
  ) -> None:
    """Prints the table, and writes metrics.jsonl, summary.csv, differences.csv, plots and report.html.

    In process 0 only.

    Args:
      results: what `run` returned.
      title: the title of the report.
      question: the question that the comparison answers.
      command: the command that reproduces it.
      notes: paragraphs for the report.
      varies: keys of `moe_jax.comparison.results.PROTOCOL` that the question varies, e.g. "slots". Arms may
        differ in them.
    """
    with processes.first_writes("report") as mine:
      if mine:
        texts = {"title": title, "question": question, "command": command, "notes": notes}
        self._report(results, varies, **texts)

  def _report(self, results: list[Result], varies: Sequence[str], **texts: Any) -> None:
    self._merge_metrics()
    report.print_table(report.summarise(results), self.console)
    report.print_differences(report.paired_differences(results, varies=varies), self.console, varies)
    paths = report.write_report(self.folder, results, varies=varies, **texts)
    self.console.print(f"report: {paths['html']}", soft_wrap=True)

  def _run_folder(self, arm: str, seed: int) -> pathlib.Path:
    return self.folder / "arms" / re.sub(r"[^\w.=+-]", "_", arm) / f"seed_{seed}"

  def _result_file(self, arm: str, seed: int) -> pathlib.Path:
    return self._run_folder(arm, seed) / "result.json"

  def _check_folder(self) -> None:
    """Raises `InputError` unless the folder is new, empty, or of the same configuration.

    Arms and seeds may be added.
    """
    known = self._known()
    changed = _differences(known["config"], to_plain(self.config, fingerprint)) if known else []
    for name in self.arms.keys() & known.get("arms", {}).keys():
      changed += [f"arm {name}: {line}" for line in _differences(known["arms"][name], self.arms[name])]
    if changed:
      raise InputError(
        f"--output_dir={self.folder}: holds a run with another configuration ({'; '.join(changed[:3])}); "
        "choose another folder or remove this one"
      )
    if not known and self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
      raise InputError(f"--output_dir={self.folder}: is not empty and holds no run; choose another folder")

  def _known(self) -> dict[str, Any]:
    """Returns config.json of the folder, or {} if there is none."""
    path = self.folder / "config.json"
    return json.loads(path.read_text()) if path.exists() else {}

  def _claim_folder(self) -> None:
    known = self._known()
    claim = {
      "arms": known.get("arms", {}) | self.arms,
      "seeds": sorted({*known.get("seeds", []), *self.seeds}),
      "config": to_plain(self.config, fingerprint),
    }
    self.folder.mkdir(parents=True, exist_ok=True)
    (self.folder / "config.json").write_text(json.dumps(claim, indent=1) + "\n")

  def _sees_claim(self) -> bool:
    """Returns whether this process can read what process 0 wrote.

    A network file system may need some time.
    """
    deadline = time.monotonic() + 10.0
    while not self._known() and time.monotonic() < deadline:
      time.sleep(0.2)
    return bool(self._known())

  def _check_fingerprint(self, fingerprint: str) -> None:
    for path in self.folder.glob("arms/*/seed_*/result.json"):
      other = json.loads(path.read_text())["fingerprint"]
      if other != fingerprint:
        raise InputError(
          f"--output_dir={self.folder}: holds results on other text (fingerprint {other[:12]}, now "
          f"{fingerprint[:12]}: another Python version or changed files); choose another folder"
        )

  def _describe(self, info: Any) -> None:
    shares = ""
    if "train" in info.targets_per_domain:
      counts = info.targets_per_domain["train"]
      shares = ", ".join(
        f"{name} {n / sum(counts):.0%}" for name, n in zip(info.domains, counts, strict=True)
      )
      shares = f", {sum(counts) / 1e6:.1f}M training tokens: {shares}"
    self.console.print(f"data: {info.name} (fingerprint {info.fingerprint[:12]}){shares}", soft_wrap=True)

  def _merge_metrics(self) -> None:
    """Writes the metrics of all runs to one file. Each line starts with its arm and seed."""
    with (self.folder / "metrics.jsonl").open("w") as out:
      for arm in self.arms:
        for seed in self.seeds:
          label = json.dumps({"arm": arm, "seed": seed})[:-1]
          for line in (self._run_folder(arm, seed) / "metrics.jsonl").read_text().splitlines():
            out.write(f"{label}, {line[1:]}\n")  # as text: JSON has no literal for a loss that is not finite


def _with_seed(config: Config, seed: int) -> Config:
  data, train = dataclasses.replace(config.data, data_seed=seed), dataclasses.replace(config.train, seed=seed)
  return dataclasses.replace(config, data=data, train=train)


def _described(arm: Arm, config: Config) -> dict[str, Any]:
  """Returns the fields of an arm as JSON values, with a digest of the source of a user's methods.

  The digest keeps results of other code under the same name from being reused.
  """
  described = {}
  for field in arm:
    value = value_of(config, field)
    is_spec = isinstance(value, str | Method) or (isinstance(value, tuple) and field != "segments")
    described[field] = fingerprint(value) if is_spec else to_plain(value, fingerprint)
  return described


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
  """Returns a text for every leaf that differs: its field, its old value and its new value."""
  if isinstance(old, dict) and isinstance(new, dict):
    keys = [*old, *(key for key in new if key not in old)]
    return [line for key in keys for line in _differences(old.get(key), new.get(key), key)]
  if old == new:
    return []
  if isinstance(old, str) and isinstance(new, str) and old.partition(" [")[0] == new.partition(" [")[0]:
    return [f"the code of {name} {old.partition(' [')[0]!r} has changed"]
  return [f"{name} was {old!r}, now {new!r}"]
