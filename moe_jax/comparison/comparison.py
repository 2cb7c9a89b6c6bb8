"""A comparison trains several arms on the same batches, with several seeds. It can be resumed."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console

from moe_jax import disk, sharding
from moe_jax.cluster import processes
from moe_jax.cluster.signals import Between
from moe_jax.comparison import sweep
from moe_jax.comparison.arms import Arm, with_arm
from moe_jax.comparison.datasets import datasets_of_arms, in_words
from moe_jax.comparison.folder import SWEEP, ComparisonFolder, Result, described
from moe_jax.comparison.goals import check_goal
from moe_jax.comparison.reporting import REPORT_FILE, merged_texts, read_texts, write_report
from moe_jax.comparison.results import load_results, lookup
from moe_jax.comparison.seeds import checked_seeds, with_seed
from moe_jax.comparison.shard import Shard
from moe_jax.comparison.tried import TRIED, tried_in_words, write_tried
from moe_jax.config import Config
from moe_jax.config.plain import fingerprint, to_plain
from moe_jax.data import Dataset, load_dataset
from moe_jax.data.text_folder import check_outside
from moe_jax.errors import InputError, NonFiniteLoss
from moe_jax.training import evaluation, identity
from moe_jax.training.compiled import check_run, compile_steps
from moe_jax.training.loop import Run
from moe_jax.training.memory import check_memory, sizes_of
from moe_jax.training.own_metrics import own_metrics
from moe_jax.training.progress import TrainingProgress
from moe_jax.training.results import diverged_result, evaluation_digest

_LOCKED_AHEAD = 200  # runs that are locked from the start on: each takes an open file


class Comparison:
  """Trains every arm with every seed in `output_dir`, and keeps the runs that an earlier call finished.

  A run whose loss is no longer finite gets a result that says so, and the others go on. Several commands may work in one
  folder, each on other runs; a run that another command has is an error.

  A seed fixes the initial parameters, the order of the batches and all random draws. All arms share them, so
  differences between arms are paired by seed. With several processes, all processes make the same calls. Only
  process 0 prints and writes.

  Args:
    arms: for each arm, its name and the fields in which it differs from `config`. Methods may be names,
      functions or classes. The first arm is the baseline.
    seeds: the seeds of the runs.
    config: the configuration of every run. Its `seed` and `data_seed` are replaced by the seed of the run.
    output_dir: a new folder, or that of an earlier comparison with the same configuration.
    sweep: values of fields and options, of which every arm gets the best. They are tried in `output_dir/sweep`, and listed
      in `output_dir/sweep.csv`.
    shard: the part of the runs to train. A sweep is split by arms.
    evaluations: for each arm, further evaluations of its trained models: a name, and the fields in which the
      evaluation differs from the arm. Results have them under `evaluations`. Not with a sweep, which renames arms.

  Raises:
    InputError: if a field is wrong, or if the folder has results of another configuration or of a method with other code.
      It is raised before any training.
  """

  def __init__(
    self,
    arms: Mapping[str, Arm],
    seeds: Iterable[int],
    config: Config,
    output_dir: str | os.PathLike[str],
    *,
    sweep: sweep.Sweep | None = None,
    shard: Shard | None = None,
    evaluations: Mapping[str, Mapping[str, Arm]] | None = None,
  ):
    disk.check_folder(output_dir)
    check_outside(output_dir, config.data)
    self.mesh = sharding.make_mesh(config.check().mesh)
    self.seeds, self.sweep, self.shard = checked_seeds(seeds), sweep, shard or Shard()
    self.config = with_seed(config, 0)  # the seed is of the run, not of the comparison
    self.console = Console(quiet=not processes.is_first())
    self.folder = ComparisonFolder(output_dir)
    # Resolved here, once: a method that is defined anew later is another arm.
    self.configs = {name: self._configured(name, arm) for name, arm in arms.items()}
    if sweep:
      arms = self._plan(arms, output_dir)
    self.folder.check_names(arms)
    self.arms = {name: described(arm, self.configs[name]) for name, arm in arms.items()}
    self.evaluations = {
      arm: {
        name: check_run(with_arm(self.configs[arm], fields), self.mesh) for name, fields in variants.items()
      }
      for arm, variants in (evaluations or {}).items()
    }
    self.evaluation_fields = {
      f"{arm}: {name}": described(fields, self.evaluations[arm][name])
      for arm, variants in (evaluations or {}).items()
      for name, fields in variants.items()
    }
    if processes.is_first():  # where it fails, the others are stopped with its message
      self.folder.check(self._claimed())

  def _configured(self, name: str, arm: Arm) -> Config:
    """Returns the checked configuration of an arm. An error says which arm, where the flags alone do not have it."""
    try:
      return check_run(with_arm(self.config, arm), self.mesh)
    except InputError as error:
      try:
        check_run(self.config, self.mesh)
      except InputError as of_flags:
        if str(of_flags) == str(error):
          raise
      raise InputError(f"arm {name}: {error}") from error

  def _plan(self, arms: Mapping[str, Arm], output_dir: str | os.PathLike[str]) -> dict[str, Arm]:
    """Makes the comparison that selects. Returns the arms with every value that may be chosen."""
    self.sweep.check(self.seeds)
    self.planned = self.sweep.candidates(self.configs)
    self.tried = {arm: self.planned[arm] for arm in self.shard.part(list(self.planned))}
    if not self.tried:
      raise InputError(f"--shard={self.shard}: a sweep is split by arms, and there are {len(self.planned)}")
    candidates = {c.name: {**arms[arm], **c.fields} for arm, tried in self.planned.items() for c in tried}
    self.configs = {name: self._configured(name, arm) for name, arm in candidates.items()}
    to_try = {c.name: candidates[c.name] for tried in self.tried.values() for c in tried if c.value}
    folder = os.path.join(output_dir, SWEEP)
    self.selection = Comparison(to_try, self.sweep.seeds, self.config, folder)
    return candidates

  @property
  def is_whole(self) -> bool:
    """Whether this comparison trains all runs, and not the part of one shard."""
    return self.shard.count == 1

  def run(self) -> list[Result]:
    """Trains the runs that are not finished, and evaluates those that lack an evaluation.

    Returns a result for each arm and seed, in the order of the arms. With a shard, it is those of its part.
    """
    with Between():
      dataset = load_dataset(self.config.data)
      self.console.print(in_words(dataset.info), soft_wrap=True, markup=False)
      identity.check_same_text(dataset.info.fingerprint)
      identity.check_same_code(self.configs.values())
      return self._run(dataset)

  def _run(self, dataset: Dataset) -> list[Result]:
    datasets = datasets_of_arms(self.configs, self.config.data, dataset)
    with processes.first_writes("check") as mine:
      if mine:
        self.folder.check_text(dataset.info.fingerprint)
        self.folder.note_other_code()
    if self.sweep:
      infos = {name: datasets[config.data].info for name, config in self.configs.items()}
      names = {arm: [c.name for c in tried] for arm, tried in self.planned.items()}
      check_goal(self.sweep.goal, names, self.configs, infos)
      self._select(dataset)
    runs = self._runs()
    self._check_runs(runs, dataset.info.fingerprint)
    todo = processes.from_first([run for run in runs if not self._is_done(*run)])
    self._check_memory({arm for arm, _ in todo}, dataset)
    self._claim()  # not before: a folder that is refused stays as it is
    if len(todo) < len(runs):
      kept = f"{len(runs) - len(todo)} of {len(runs)} runs in {self.folder.path} are done and kept"
      self.console.print(kept, soft_wrap=True, markup=False)
    steps = sum(self.configs[a].train.num_steps for a, s in todo if not self._is_trained(a, s))
    locks = [
      (self.folder.run(a, s), f"run {a} seed {s} in {self.folder.path}") for a, s in todo[:_LOCKED_AHEAD]
    ]
    with identity.hold(locks), TrainingProgress(steps, self.console) as progress:
      for arm, seed in todo:
        self._run_one(arm, seed, datasets[self.configs[arm].data], progress)
    processes.wait_for_all("results")
    mine = set(runs)
    return [self.folder.result(a, s) for a in self.arms for s in self.seeds if (a, s) in mine]

  def _runs(self) -> list[tuple[str, int]]:
    """Returns (arm, seed) of every run of this process, in the order in which they are trained."""
    runs = [(arm, seed) for seed in self.seeds for arm in self.arms]
    return runs if self.sweep else self.shard.part(runs)

  def _check_runs(self, runs: list[tuple[str, int]], text: str) -> None:
    """Raises `InputError` if a run is of another configuration, whatever the folder's config.json says."""
    teachers = {arm: identity.teacher_of(config) for arm, config in self.configs.items()}
    with processes.refused_together():
      for refused in self._refusals(runs, text, teachers) if processes.is_first() else ():
        if refused:
          raise InputError(refused)

  def _refusals(self, runs: list[tuple[str, int]], text: str, teachers: dict[str, str]) -> Iterator[str]:
    """Yields a line, or "", for each of `runs`. If config.json is lost, also for all finished ones: they come into one table."""
    for arm, seed in runs:
      config = with_seed(self.configs[arm], seed)
      yield identity.refusal(self.folder.run(arm, seed), config, text, teachers[arm])
    arms = {self.folder.run(arm, 0).parent: arm for arm in self.configs}
    for path, seed in () if self.folder.known() else self.folder.finished():
      if path.parent not in arms:
        yield (
          f"--output_dir={self.folder.path}: config.json is lost, so nothing says how {path} is configured; name its arm and "
          "the others in one command, bring config.json back, or choose another folder"
        )
      arm = arms[path.parent]
      yield identity.refusal(path, with_seed(self.configs[arm], seed), text, teachers[arm])

  def _check_memory(self, arms: set[str], dataset: Dataset) -> None:
    """Raises `InputError` if an arm is too large, before the first one is trained."""
    info, configs = dataset.info, {sizes_of(self.configs[arm]): self.configs[arm] for arm in sorted(arms)}
    for config in configs.values():
      steps = compile_steps(config, info.vocab_size, len(info.domains), self.mesh)
      check_memory(config, steps, info.vocab_size, self.mesh)

  def _is_trained(self, arm: str, seed: int) -> bool:
    """Returns whether the run is finished, with as many steps as are asked for."""
    result = self.folder.result(arm, seed)
    if "diverged" in result:
      return True
    return bool(result) and not identity.is_shorter(self.folder.run(arm, seed), self.configs[arm])

  def _is_done(self, arm: str, seed: int) -> bool:
    return self._is_trained(arm, seed) and not self._lacking(arm, seed)

  def _lacking(self, arm: str, seed: int) -> list[str]:
    """Returns the names of the evaluations that a finished run lacks, or has of another configuration."""
    result = self.folder.result(arm, seed)
    if "diverged" in result:
      return []
    has, lacking = result.get("evaluations", {}), []
    for name, config in self.evaluations.get(arm, {}).items():
      known = lookup(result, "evaluation_digests", name)  # None: of older code, which config.json tells apart
      if name not in has or known not in (None, evaluation_digest(with_seed(config, seed))):
        lacking.append(name)
    return lacking

  def _run_one(self, arm: str, seed: int, dataset: Dataset, progress: TrainingProgress) -> None:
    """Trains and evaluates one run, as far as it is not done."""
    folder = self.folder.run(arm, seed)
    config = with_seed(self.configs[arm], seed)
    known = self.folder.starts()
    run = Run(config, dataset, folder, progress, label=arm, show=f"{arm} seed {seed}", starts=known)
    if not self._is_trained(arm, seed):
      try:
        run.train()
      except NonFiniteLoss as error:
        progress.finish_run()
        progress.note(f"{error}; the arm is kept as diverged")
        if processes.is_first():
          self.folder.write_result(arm, seed, diverged_result(run, str(error)))
        return
    processes.wait_for_all("result")
    lacking = self._lacking(arm, seed)
    if lacking:
      evaluation.evaluate_as(run, {name: with_seed(self.evaluations[arm][name], seed) for name in lacking})

  def _select(self, dataset: Dataset) -> None:
    """Tries the values of the sweep, and keeps the best of every arm of this process."""
    selection = self.selection
    results = selection._run(dataset) if selection.arms else []
    chosen, lines = self.sweep.choose(self.tried, results)
    self.arms = {c.name: self.arms[c.name] for c in chosen.values()}
    for sentence in tried_in_words(lines):
      self.console.print(sentence, soft_wrap=True, highlight=False, markup=False)
    with processes.first_writes("sweep") as mine:
      if mine:
        write_tried(self.folder.path / TRIED, lines)

  def report(
    self,
    results: list[Result],
    *,
    title: str,
    question: str,
    command: str,
    notes: Sequence[str] = (),
    varies: Sequence[str] = (),
    states: Sequence[str] = (),
    beside: Callable[[list[Result], str], Sequence[str]] | None = None,
  ) -> None:
    """Prints the table, and writes metrics.jsonl, summary.csv, differences.csv, plots and report.html.

    In process 0 only. For a shard, it only says how to go on: `scripts/join.py` writes the report of all shards.

    Args:
      results: what `run` returned.
      title: the title of the report.
      question: the question that the comparison answers.
      command: the command that reproduces it.
      notes: paragraphs for the report. What a sweep tried and what was dropped follows them. Those of earlier commands stay,
        as long as the folder has results of them: they must be true of the arms of any command.
      varies: keys of `moe_jax.comparison.results.PROTOCOL` that the question varies, e.g. "slots". Arms may
        differ in them, and in what a sweep chose.
      states: fields that arms set and their names do not say, such as "balancers". A paragraph says which arm has which.
      beside: writes further files, given all results of the folder and their commands. Returns paragraphs on them, which stay
        for this report only. Not called for a shard.
    """
    with Between(), processes.first_writes("report") as mine:
      if mine:
        texts = {
          "title": title,
          "question": question,
          "commands": [command],
          "notes": [*notes],
          "varies": [*varies],
          "states": [*states],
        }
        if self.sweep:
          texts["swept"] = self.sweep.described(self.planned, self.configs)
        earlier = read_texts(self.folder.path)
        if earlier and self._has_others(results):
          texts = merged_texts([earlier, texts])
        disk.write_json(self.folder.path / REPORT_FILE, texts)
        if self.is_whole:
          self._report(results, beside, **texts)
        else:
          said = self.shard.in_words(len(results), self.folder.path)
          self.console.print(said, soft_wrap=True, highlight=False, markup=False)

  def _has_others(self, results: list[Result]) -> bool:
    """Returns whether the folder has results of earlier commands besides `results`."""
    own = {(result["arm"], result["seed"]) for result in results}
    return not {(result["arm"], result["seed"]) for result in load_results(self.folder.path)} <= own

  def _report(self, results: list[Result], beside: Any, **texts: Any) -> None:
    own = {(result["arm"], result["seed"]): result for result in results}
    stored = {(result["arm"], result["seed"]): result for result in load_results(self.folder.path)}
    self.folder.merge_metrics(stored)
    if stored.keys() - own.keys():  # of other commands in this folder; what `results` have besides stays
      results = list((stored | own).values())
    of_results = beside(results, "; ".join(texts["commands"])) if beside else ()
    write_report(self.folder, results, self.console, of_results=of_results, **texts)

  def _claim(self) -> None:
    with processes.first_writes("claim") as mine:
      if mine:
        self.folder.claim(self._claimed())
    what = f"--output_dir={self.folder.path}: holds the config.json of process 0"
    processes.check_agree(self.folder.sees_claim(), what, "all processes must share its file system")

  def _claimed(self) -> dict[str, Any]:
    """Returns what config.json says of this comparison."""
    claim = {"arms": self.arms, "seeds": self.seeds, "config": to_plain(self.config, fingerprint)}
    if metrics := own_metrics():
      claim["own_metrics"] = metrics
    if self.evaluation_fields:
      claim["evaluations"] = self.evaluation_fields
    if self.sweep:
      values = {field: list(texts) for field, texts in self.sweep.grid}
      claim["sweep"] = {"goal": self.sweep.goal, "selection seeds": list(self.sweep.seeds), "values": values}
      claim["planned"] = {arm: [c.name for c in tried] for arm, tried in self.planned.items()}
    return claim
