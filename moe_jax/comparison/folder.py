"""The folder of a comparison: its config.json, where its runs are, and whether it may be used again."""

import contextlib
import json
import os
import pathlib
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moe_jax import disk, locks
from moe_jax.comparison.arms import Arm, value_of
from moe_jax.comparison.results import lookup, starts_of
from moe_jax.config import Config
from moe_jax.config.plain import fingerprint, to_plain
from moe_jax.errors import InputError
from moe_jax.fingerprint import of_package
from moe_jax.registry import Method
from moe_jax.training.changes import changes, differences
from moe_jax.training.identity import other_fingerprint
from moe_jax.training.metric_writer import read_lines
from moe_jax.training.own_metrics import changed_metrics, metrics_said
from moe_jax.training.result_file import RESULT_FILE, Result, read_result, write_result

# Parts of a claim that may grow with every call. Everything else of it must stay as it is.
GROWING = ("arms", "seeds", "evaluations", "planned", "own_metrics")
SWEEP = "sweep"  # the folder of what a sweep tried, itself the folder of a comparison


class ComparisonFolder:
  """`config.json`, and a run per arm and seed in `arms/ARM/seed_SEED`. Nothing is written before `claim`.

  Args:
    path: a new folder, or that of a comparison.
  """

  def __init__(self, path: str | os.PathLike[str]):
    self.path = pathlib.Path(path)

  def run(self, arm: str, seed: int) -> pathlib.Path:
    """Returns the folder of one run."""
    return self.path / "arms" / re.sub(r"[^\w.=+-]", "_", arm) / f"seed_{seed}"

  def check_names(self, arms: Iterable[str]) -> None:
    """Raises `InputError` if two arms, of these and of earlier calls, would have one folder."""
    names: dict[pathlib.Path, str] = {}
    for arm in (*self.known().get("arms", {}), *arms):
      other = names.setdefault(self.run(arm, 0).parent, arm)
      if other != arm:
        raise InputError(
          f"arms {other!r} and {arm!r}: both would be in {self.run(arm, 0).parent}; use names that differ in letters, digits "
          "or one of _ . = + -"
        )

  def finished(self) -> list[tuple[pathlib.Path, int]]:
    """Returns (folder, seed) of every run with a result, whichever call trained it."""
    folders = sorted(path.parent for path in self.path.glob(f"arms/*/seed_*/{RESULT_FILE}"))
    seeds = [(folder, folder.name.removeprefix("seed_")) for folder in folders]
    return [(folder, int(seed)) for folder, seed in seeds if seed.isdecimal()]

  def starts(self) -> dict[str, str]:
    """Returns the digest of the parameters that each folder of `init_from` had when finished runs started from it."""
    return starts_of(read_result(folder / RESULT_FILE) for folder, _ in self.finished())

  def has_result(self, arm: str, seed: int) -> bool:
    """Returns whether the run is finished: it has a whole result."""
    return bool(self.result(arm, seed))

  def result(self, arm: str, seed: int) -> Result:
    """Returns the result of a finished run, or {}."""
    return read_result(self.run(arm, seed) / RESULT_FILE)

  def write_result(self, arm: str, seed: int, result: Result) -> None:
    """Writes the result of a run that did not write it itself."""
    write_result(self.run(arm, seed) / RESULT_FILE, result)

  def known(self) -> dict[str, Any]:
    """Returns what earlier calls claimed, or {} if there were none, or it cannot be read."""
    known = disk.read_object(self.path / "config.json") or {}
    return known if _is_claim(known) else {}

  def _can_be_read(self) -> bool:
    known = disk.read_object(self.path / "config.json")
    return known is not None and _is_claim(known)

  def _held(self) -> contextlib.AbstractContextManager[None]:
    """Keeps other commands from writing config.json."""
    return locks.hold(self.path / locks.LOCK, f"--output_dir={self.path}", wait=60.0)

  def sees_claim(self) -> bool:
    """Returns whether this process can read what process 0 claimed. A network file system may need some time."""
    deadline = time.monotonic() + 10.0
    while not self.known() and time.monotonic() < deadline:
      time.sleep(0.2)
    return bool(self.known())

  def check(self, claim: Mapping[str, Any]) -> None:
    """Raises `InputError` unless the folder is new, empty, or of the same configuration.

    Arms, seeds and evaluations may be added. A config.json that cannot be read is moved aside; runs have their own.
    """
    path = self.path / "config.json"
    is_lost = not path.exists() and any(self.path.glob("arms/*/seed_*"))
    # One that an earlier start moved aside was there, too, whatever that start then ended with.
    was_there = path.exists() or is_lost or any((self.path / disk.ASIDE).glob(f"{path.name}-*"))
    consequence = "it is written again from the flags, and runs are checked by their own"
    if path.exists() and not self._can_be_read():
      with self._held():  # it is read again there: another command may have put a new one in its place
        disk.set_aside_damaged(path, self.path, consequence, _is_claim)
    if is_lost:
      disk.note(f"{path}: is missing; {consequence}")
    if was_there:
      self._check_same(claim)
    elif self.path.exists() and not self._is_free():
      raise InputError(f"--output_dir={self.path}: is not empty and holds no run; choose another folder")

  def _check_same(self, claim: Mapping[str, Any]) -> None:
    known = self.known()
    changed = claim_differences(known, claim) if known else []
    if changed:
      raise InputError(
        f"--output_dir={self.path}: holds a run with another configuration ({'; '.join(changed[:3])}); "
        "choose another folder or remove this one"
      )

  def _is_free(self) -> bool:
    """Returns whether there is nothing in the folder, or only what a sweep tried before any run was claimed."""
    own = (SWEEP, locks.LOCK, disk.ASIDE)
    return self.path.is_dir() and all(
      path.name in own or path.name.startswith(disk.WRITING) for path in self.path.iterdir()
    )

  def claim(self, claim: Mapping[str, Any]) -> None:
    """Writes config.json, with what earlier calls claimed. Several commands may do so at the same time."""
    with self._held():
      self._check_same(claim)  # another command may have been first
      disk.write_json(self.path / "config.json", merged_claim(self.known(), claim))

  def check_text(self, fingerprint: str) -> None:
    """Raises `InputError` if the folder has a result on other text."""
    for path in self.path.glob(f"arms/*/seed_*/{RESULT_FILE}"):
      other = read_result(path).get("fingerprint", fingerprint)
      if other != fingerprint:
        raise InputError(
          f"--output_dir={self.path}: holds results on other text ({other_fingerprint(other, fingerprint)}); bring "
          "that text back, or choose another folder"
        )

  def note_other_code(self) -> None:
    """Says in one line that finished runs were trained by other code of this package, if they were."""
    here, others = of_package(), {}
    for path in sorted(self.path.glob(f"arms/*/seed_*/{RESULT_FILE}")):
      code = lookup(read_result(path), "versions", "code")
      if code not in (None, here):  # None: of a version that did not store it
        others[path.parent] = code
    if others:
      first, code = next(iter(others.items()))
      disk.note(
        f"{self.path}: was trained by other code of moe_jax, number of runs: {len(others)}, such as {first} (digest {code}, "
        f"now {here}); they are kept, and the report names both. For one code throughout, choose another folder"
      )

  def merge_metrics(self, runs: Iterable[tuple[str, int]]) -> None:
    """Writes the metrics of the (arm, seed) runs to one file. Each line starts with its arm and seed.

    Lines that cannot be read are left out, and one line says so.
    """
    merged: list[str] = []
    for arm, seed in runs:
      label = json.dumps({"arm": arm, "seed": seed})[:-1]
      path = self.run(arm, seed) / "metrics.jsonl"
      lines, lost = read_lines(path)
      result = self.result(arm, seed)
      last, steps = max((line["step"] for _, line in lines), default=0), result.get("num_steps", 0)
      expected = result.get("metric_lines", len(lines))
      if lost or last < steps or len(lines) < expected:
        disk.note(
          f"{path}: is damaged; {len(lines)} of {expected} lines are there, up to step {last} of {steps}, and {lost} "
          "cannot be read"
        )
      # As text: JSON has no literal for a loss that is not finite.
      merged += [f"{label}, {text.rstrip()[1:]}\n" for text, _ in lines]
    disk.write_whole(self.path / "metrics.jsonl", "".join(merged).encode())


def _is_claim(value: Mapping[str, Any]) -> bool:
  """Returns whether the parts of a config.json have the types of a claim."""
  seeds = value.get("seeds", [])
  parts = [value.get(part, {}) for part in ("arms", "evaluations")]
  metrics = value.get("own_metrics", {})
  return (
    isinstance(seeds, list)
    and all(type(seed) is int for seed in seeds)
    and isinstance(value.get("config", {}), dict)
    and isinstance(metrics, dict)
    and all(isinstance(digest, str) for digest in metrics.values())
    and all(isinstance(part, dict) and all(isinstance(of, dict) for of in part.values()) for part in parts)
    and _is_planned(value.get("planned", {}))
  )


def _is_planned(value: Any) -> bool:
  lists = list(value.values()) if isinstance(value, dict) else [None]
  return all(isinstance(part, list) and all(isinstance(name, str) for name in part) for part in lists)


def described(arm: Arm, config: Config) -> dict[str, Any]:
  """Returns the fields of an arm as JSON values, with a digest of the source of a user's methods.

  The digest keeps results of other code under the same name from being reused.

  Args:
    arm: its fields.
    config: the resolved configuration of the arm.
  """
  found = {}
  for field in arm:
    value = value_of(config, field)
    is_spec = isinstance(value, str | Method) or (isinstance(value, tuple) and field != "segments")
    found[field] = fingerprint(value) if is_spec else to_plain(value, fingerprint)
  return found


def merged_claim(known: Mapping[str, Any], claim: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a claim with the arms, seeds and evaluations of both, those of `known` first.

  Arms that a sweep chose come in the order of the sweep, whichever shard was first.
  """
  merged = dict(claim)
  for part in GROWING:
    if isinstance(claim.get(part), Sequence):
      merged[part] = sorted({*known.get(part, ()), *claim[part]})
    elif part in claim or part in known:
      merged[part] = known.get(part, {}) | claim.get(part, {})
  rank = {name: i for i, name in enumerate(n for tried in merged.get("planned", {}).values() for n in tried)}
  merged["arms"] = dict(sorted(merged["arms"].items(), key=lambda arm: rank.get(arm[0], 0)))
  return merged


def claim_differences(known: Mapping[str, Any], claim: Mapping[str, Any]) -> list[str]:
  """Returns a text for everything that two claims say differently: of arms and evaluations, what both have.

  Fields that change no run may differ: `moe_jax.training.changes.FREE`.
  """
  fixed = lambda parts: {
    name: value for name, value in parts.items() if name not in GROWING and name != "config"
  }
  found = differences(fixed(known), fixed(claim))
  found += changes(known.get("config", {}), claim.get("config", {}))
  metrics = changed_metrics(metrics_said(known), metrics_said(claim))
  found += [f"other code of the metric {metric}" for metric in metrics]
  for part, word in (("arms", "arm"), ("evaluations", "evaluation")):
    for name in claim.get(part, {}):
      if name in known.get(part, {}):
        changed = differences(known[part][name], claim[part][name])
        found += [f"{word} {name}: {line}" for line in changed]
  return found
