"""Training to a target: attempt and reference in turn, and their paired ratios of seconds, tokens and bytes.

docs/LEADERBOARD.md has the rules, and experiments/speedrun.py their numbers.
"""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console

from moe_jax import disk, locks
from moe_jax.analysis.leaderboard import ARMS, score
from moe_jax.config import Config, ModelConfig
from moe_jax.config.plain import fingerprint, to_plain
from moe_jax.data import Dataset, load_dataset
from moe_jax.data.text_folder import check_outside
from moe_jax.errors import InputError, Stopped
from moe_jax.sharding import make_mesh
from moe_jax.training.changes import changes
from moe_jax.training.compiled import abstract_model, check_run
from moe_jax.training.identity import check_same_run
from moe_jax.training.loop import Run
from moe_jax.training.own_leaks import sees_later_tokens
from moe_jax.training.progress import TrainingProgress
from moe_jax.training.protocol import max_vio_ranges
from moe_jax.training.result_file import RESULT_FILE, read_result
from moe_jax.training.results import count_params, versions

HERE = "where.json"  # in the folder of a seed: what it ran on


@dataclasses.dataclass(frozen=True)
class Rules:
  """What an attempt must reach, and its bounds."""

  target_bits_per_byte: float  # over the whole validation split
  max_active_params: int  # those that one token uses, embeddings included
  max_vio: float  # over the whole validation split, mean over the layers with more experts than a token gets
  evaluate_bytes: int  # of training text between evaluations

  def reached(self, bits_per_byte: float, max_vio: float) -> bool:
    """Returns whether an evaluation meets the target and is balanced."""
    return bits_per_byte <= self.target_bits_per_byte and max_vio <= self.max_vio


def max_vio(validation: Mapping[str, Any], model: ModelConfig) -> float:
  """Returns MaxVio over the validation split, averaged over the layers of a resolved model with E > K.

  The others, which cannot be out of balance, would only dilute the mean. 0 if there is no such layer.
  """
  found, ranges = validation.get("max_vio", []), max_vio_ranges(model)
  if len(found) == len(ranges):  # otherwise some layers are of a kind whose E and K are not known
    found = [value for value, bound in zip(found, ranges, strict=True) if bound > 1]
  return float(np.mean(found)) if found else 0.0


class Speedrun:
  """Trains attempt and reference with every seed to the target of `rules`, each to at most its `num_steps`.

  Args:
    attempt: the configuration that is measured. The folder keeps the pairs that an earlier call finished. A seed
      whose second run is missing starts over, so that both runs of a pair see the same machine: what it had is moved to
      `damaged`.
    reference: what it is compared with, on the attempt's text.
    rules: target and bounds.
    folder: gets config.json, and a folder for each seed with the two runs.
    about: what the folder must agree with besides, e.g. the commit.
    machine: what the pairs that this call trains run on. Each pair records its own: the two runs of a pair are compared,
      and no two pairs.

  Raises:
    InputError: if a configuration is wrong, looks at later tokens, has too many active parameters or no bits per
      byte, or if the folder holds runs of another attempt or, when they run, on other text. It is raised before any training.
  """

  def __init__(
    self,
    attempt: Config,
    reference: Config,
    rules: Rules,
    folder: str | os.PathLike[str],
    about: Mapping[str, Any],
    machine: Mapping[str, Any],
  ):
    text = ("dataset", "data_dir", "text_folder")
    data = dataclasses.replace(reference.data, **{name: getattr(attempt.data, name) for name in text})
    reference = dataclasses.replace(reference, data=data)
    self.configs = {"reference": _to_run(reference), "attempt": _to_run(attempt)}
    self.rules, self.folder = rules, pathlib.Path(folder)
    self.here = {"machine": dict(machine), "versions": versions()}
    self.claim = {
      "rules": dataclasses.asdict(rules),
      "reference": reference.to_dict(),
      "attempt": to_plain(self.configs["attempt"], fingerprint),
      **about,
    }
    self._check_folder()
    self.data = {arm: load_dataset(config.data) for arm, config in self.configs.items()}
    self.params = {arm: self._count(arm) for arm in ARMS}
    for arm in ARMS:
      self.configs[arm] = self._with_evaluations(self.configs[arm], self.data[arm])

  def run(self, seeds: Sequence[int], console: Console | None = None) -> dict[str, Any]:
    """Trains what is missing and returns the entry of the leaderboard."""
    done = {seed: self._finished(seed) for seed in seeds}
    for seed in (seed for seed, pair in done.items() if pair):
      for arm in ARMS:
        text = self.data[arm].info.fingerprint
        check_same_run(self._seed_folder(seed) / arm, self._of_seed(arm, seed), text)
    self.folder.mkdir(parents=True, exist_ok=True)
    disk.write_json(self.folder / "config.json", self.claim)
    steps = sum(config.train.num_steps for config in self.configs.values())
    with TrainingProgress(steps * sum(pair is None for pair in done.values()), console) as progress:
      for seed, pair in done.items():
        if pair is None:
          with locks.hold(self._seed_folder(seed) / locks.LOCK, f"seed {seed} in {self.folder}"):
            done[seed] = self._run_pair(seed, progress)
    pairs = [{"seed": seed, **pair} for seed, pair in done.items()]
    total, active = self.params["attempt"]
    counts = {"num_params": total, "num_active_params": active}
    counts |= {
      "fingerprint": self.data["reference"].info.fingerprint
    }  # with its tokenizer, so one for all attempts
    return {**self.claim, **counts, "seeds": pairs, "score": score(pairs)}

  def _seed_folder(self, seed: int) -> pathlib.Path:
    return self.folder / f"seed_{seed}"

  def _here(self, seed: int) -> dict[str, Any]:
    """Returns what a seed ran on; {} if it is not known."""
    found = disk.read_object(self._seed_folder(seed) / HERE) or {}
    whole = set(self.here) <= set(found) and disk.has_its_digest(found)
    return {name: found[name] for name in self.here} if whole else {}

  def _result(self, arm: str, seed: int) -> pathlib.Path:
    return self._seed_folder(seed) / arm / RESULT_FILE

  def _finished(self, seed: int) -> dict[str, Any] | None:
    """Returns where a seed ran, and the numbers of both runs; None if something is missing or damaged."""
    here, results = self._here(seed), {arm: read_result(self._result(arm, seed)) for arm in ARMS}
    if not here or not all(results.values()):
      return None
    return here | {arm: self._numbers(arm, result) for arm, result in results.items()}

  def _run_pair(self, seed: int, progress: TrainingProgress) -> dict[str, Any]:
    """Trains both runs of a seed. Where both are done, and a result is damaged, it is made again from its checkpoint."""
    if pair := self._finished(seed):  # by another command
      return pair
    here = self._here(seed)
    if not here or not all(self._result(arm, seed).exists() for arm in ARMS):
      self._start_over(seed)
      here = self.here
      disk.write_json(self._seed_folder(seed) / HERE, disk.with_digest(here))
    results = {arm: read_result(self._result(arm, seed)) for arm in ARMS}
    return here | {
      arm: self._numbers(arm, results[arm]) if results[arm] else self._train(arm, seed, progress)
      for arm in ARMS
    }

  def _start_over(self, seed: int) -> None:
    """Moves what there is of a seed aside, unless a process trains it."""
    folder = self._seed_folder(seed)
    there = [path for path in sorted(folder.iterdir()) if path.name not in (locks.LOCK, disk.ASIDE)]
    with contextlib.ExitStack() as stack:
      for path in there:
        if path.is_dir():
          stack.enter_context(locks.hold(path / locks.LOCK, str(path)))
      for path in there:
        disk.move_aside(path, folder, "is of a pair that starts over")
    if there:
      disk.note(f"{folder}: is no whole pair and starts over; what was there is in {folder / disk.ASIDE}")

  def _of_seed(self, arm: str, seed: int) -> Config:
    config = self.configs[arm]
    data, train = (
      dataclasses.replace(config.data, data_seed=seed),
      dataclasses.replace(config.train, seed=seed),
    )
    return dataclasses.replace(config, data=data, train=train)

  def _train(self, arm: str, seed: int, progress: TrainingProgress) -> dict[str, Any]:
    run = Run(
      self._of_seed(arm, seed),
      self.data[arm],
      self._seed_folder(seed) / arm,
      progress,
      label=arm,
      show=f"{arm} seed {seed}",
      stop=lambda validation: self._reached(arm, validation),
    )
    try:
      return self._numbers(arm, run.train())
    except Stopped as error:
      raise Stopped(
        f"{arm} seed {seed}: stopped; finished pairs are kept, and the same command starts this one over, because its two "
        "runs must see the same machine"
      ) from error

  def _reached(self, arm: str, validation: Mapping[str, Any]) -> bool:
    return self.rules.reached(validation["bits_per_byte"], max_vio(validation, self.configs[arm].model))

  def _numbers(self, arm: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the leaderboard keeps of a result.

    The first step of a process is not timed, because it compiles. It counts as long as the others.
    """
    tokens = result["num_steps"] * result["tokens_per_step"]
    return {
      "reached": self._reached(arm, result["validation"]),
      "seconds": tokens / result["training"]["tokens_per_second"],
      "tokens": tokens,
      "bytes": round(tokens * result["bytes_per_token"]),
      "num_steps": result["num_steps"],
      "bits_per_byte": result["validation"]["bits_per_byte"],
      "max_vio": max_vio(result["validation"], self.configs[arm].model),
      "compile_seconds": result["training"]["compile_seconds"],
    }

  def _count(self, arm: str) -> tuple[int, int]:
    """Returns (all parameters, active ones), within the bound."""
    info = self.data[arm].info
    if info.bytes_per_token is None:
      raise InputError(f"--dataset={info.name}: has no bytes, so no bits per byte; use stdlib or text_folder")
    total, active = count_params(abstract_model(self.configs[arm], info.vocab_size))
    bound = self.rules.max_active_params
    if active > bound:
      raise InputError(f"--max_active_params={bound}: the {arm} has {active:,} active parameters")
    return total, active

  def _with_evaluations(self, config: Config, data: Dataset) -> Config:
    per_step = config.data.batch_size * config.data.sequence_length * data.info.bytes_per_token
    every = max(2, round(self.rules.evaluate_bytes / per_step))  # the first step is not timed
    return dataclasses.replace(config, train=dataclasses.replace(config.train, eval_every=every))

  def _check_folder(self) -> None:
    disk.check_folder(self.folder)
    for config in self.configs.values():
      check_outside(self.folder, config.data)
    path = self.folder / "config.json"
    if path.exists():
      known = disk.read_object(path)
      if known is None:
        raise InputError(f"{path}: is damaged; restore it, or choose another folder")
      other = [key for key, value in self.claim.items() if _is_other(key, known.get(key), value)]
      if other:
        raise InputError(
          f"--output_dir={self.folder}: holds runs with other {', '.join(other)}; choose another folder or remove "
          "this one"
        )
    elif self.folder.exists() and not self._is_free():
      raise InputError(
        f"--output_dir={self.folder}: is not empty and holds no attempt; choose another folder"
      )

  def _is_free(self) -> bool:
    """Returns whether the folder holds nothing but a file that a kill has left half written."""
    return self.folder.is_dir() and all(p.name.startswith(disk.WRITING) for p in self.folder.iterdir())


def _is_other(key: str, known: Any, value: Any) -> bool:
  """Returns whether what a folder says under a key differs. Of a configuration, only what changes the run or its seconds counts."""
  if key not in ARMS or not isinstance(known, Mapping):
    return known != value
  strict = lambda config: (config.get("mesh"), config.get("train", {}).get("num_steps"))
  return strict(known) != strict(value) or bool(changes(known, value))


def learned_before(attempt: Mapping[str, Any]) -> str:
  """Returns the flag by which an attempt, as JSON values, has what other training learned; empty if it has nothing."""
  train = attempt["train"]
  flags = [
    ("init_from", bool(train["init_from"])),
    ("objective", str(train["objective"]).startswith("distil")),
  ]
  return next((f"--{name}={train[name]}" for name, learned in flags if learned), "")


def _to_run(config: Config) -> Config:
  """Returns the configuration, checked, evaluated on the whole validation split and saved only at the end."""
  if learned := learned_before(config.to_dict()):
    raise InputError(f"{learned}: an attempt starts from nothing; what was learned before is training, too")
  same = {
    "seed": 0,
    "eval_batches": 0,
    "checkpoint_every": 0,
    "tensorboard": False,
    "record_router_logits": 0,
  }
  config = dataclasses.replace(
    config,
    data=dataclasses.replace(config.data, data_seed=0),
    train=dataclasses.replace(config.train, **same),
  )
  config = check_run(config, make_mesh(config.mesh))
  if not config.model.causal:
    raise InputError(f"--objective={config.train.objective}: must be next_token, which has bits per byte")
  sees_later = sees_later_tokens(config.model)
  if sees_later is not False:
    unknown = "a part could not be checked, see the note"
    which = f"--accept_leaks={config.model.moe.accept_leaks}" if sees_later else unknown
    raise InputError(f"{which}: an attempt must not look at the tokens that it predicts")
  if config.train.num_steps < 2:
    raise InputError(f"--num_steps={config.train.num_steps}: must be 2 or more; the first step is not timed")
  return config
