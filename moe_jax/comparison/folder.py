"""The folder of a comparison: its config.json, where its runs are, and whether it may be used again."""

import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moe_jax.comparison.arms import Arm, value_of
from moe_jax.config import Config
from moe_jax.config.plain import fingerprint, to_plain
from moe_jax.errors import InputError
from moe_jax.registry import Method
from moe_jax.training.load import write_json

Result = dict[str, Any]
# Parts of a claim that may grow with every call. Everything else of it must stay as it is.
GROWING = ("arms", "seeds", "evaluations", "planned")
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

  def has_result(self, arm: str, seed: int) -> bool:
    """Returns whether the run is finished."""
    return (self.run(arm, seed) / "result.json").exists()

  def result(self, arm: str, seed: int) -> Result:
    """Returns the result of a finished run."""
    return json.loads((self.run(arm, seed) / "result.json").read_text())

  def known(self) -> dict[str, Any]:
    """Returns what earlier calls claimed, or {} if there were none."""
    path = self.path / "config.json"
    return json.loads(path.read_text()) if path.exists() else {}

  def check(self, claim: Mapping[str, Any]) -> None:
    """Raises `InputError` unless the folder is new, empty, or of the same configuration.

    Arms, seeds and evaluations may be added.
    """
    known = self.known()
    changed = claim_differences(known, claim) if known else []
    if changed:
      raise InputError(
        f"--output_dir={self.path}: holds a run with another configuration ({'; '.join(changed[:3])}); "
        "choose another folder or remove this one"
      )
    if not known and self.path.exists() and not self._is_free():
      raise InputError(f"--output_dir={self.path}: is not empty and holds no run; choose another folder")

  def _is_free(self) -> bool:
    """Returns whether there is nothing in the folder, or only what a sweep tried before any run was claimed."""
    return self.path.is_dir() and all(path.name == SWEEP for path in self.path.iterdir())

  def claim(self, claim: Mapping[str, Any]) -> None:
    """Writes config.json, with what earlier calls claimed."""
    write_json(self.path / "config.json", merged_claim(self.known(), claim))

  def check_text(self, fingerprint: str) -> None:
    """Raises `InputError` if the folder has a result on other text."""
    for path in self.path.glob("arms/*/seed_*/result.json"):
      other = json.loads(path.read_text())["fingerprint"]
      if other != fingerprint:
        raise InputError(
          f"--output_dir={self.path}: holds results on other text (fingerprint {other[:12]}, now "
          f"{fingerprint[:12]}: another Python version or changed files); choose another folder"
        )

  def merge_metrics(self, runs: Iterable[tuple[str, int]]) -> None:
    """Writes the metrics of the (arm, seed) runs to one file. Each line starts with its arm and seed."""
    with (self.path / "metrics.jsonl").open("w") as out:
      for arm, seed in runs:
        label = json.dumps({"arm": arm, "seed": seed})[:-1]
        for line in (self.run(arm, seed) / "metrics.jsonl").read_text().splitlines():
          out.write(f"{label}, {line[1:]}\n")  # as text: JSON has no literal for a loss that is not finite


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

  A field of the configuration that is younger than a claim has its default there.
  """
  fixed = lambda parts: {
    name: _with_defaults(value) if name == "config" else value
    for name, value in parts.items()
    if name not in GROWING
  }
  found = _differences(fixed(known), fixed(claim))
  for part, word in (("arms", "arm"), ("evaluations", "evaluation")):
    for name in claim.get(part, {}):
      if name in known.get(part, {}):
        found += [f"{word} {name}: {line}" for line in _differences(known[part][name], claim[part][name])]
  return found


def _with_defaults(config: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
  filled = dict(to_plain(Config(), fingerprint) if defaults is None else defaults)
  for name, value in config.items():
    nested = isinstance(value, Mapping) and isinstance(filled.get(name), Mapping)
    filled[name] = _with_defaults(value, filled[name]) if nested else value
  return filled


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
