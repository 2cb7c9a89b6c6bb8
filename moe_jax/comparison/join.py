"""Joins the folders of shards into the folder that one process would have written."""

import os
import pathlib
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from moe_jax import disk, locks
from moe_jax.comparison.folder import (
  SWEEP,
  ComparisonFolder,
  claim_differences,
  merged_claim,
)
from moe_jax.comparison.reporting import REPORT_FILE, merged_texts, read_texts, write_report
from moe_jax.comparison.results import load_results, lookup, starts_of
from moe_jax.comparison.tried import TRIED, read_tried, write_tried
from moe_jax.errors import InputError
from moe_jax.training.result_file import Result, read_result, steps_asked


def join(
  folders: Sequence[str | os.PathLike[str]], output_dir: str | os.PathLike[str], console: Console
) -> list[str]:
  """Copies the finished runs of all folders into one, and writes its report.

  Args:
    folders: of comparisons with the same configuration, such as those of shards.
    output_dir: a new folder.
    console: where to print the table.

  Returns:
    The runs that are missing, as "ARM seed SEED".

  Raises:
    InputError: if a folder holds no comparison, if two have another configuration, other code or other text, if
      two have different results of one run or other parameters of one `init_from`, if `output_dir` is not empty, or a file cannot be copied. Nothing is
      written then.
  """
  sources, target = [ComparisonFolder(folder) for folder in folders], ComparisonFolder(output_dir)
  if not sources:
    raise InputError("no folders: give the folders of all shards, e.g. runs/shard_*")
  if target.path.exists() and (not target.path.is_dir() or any(target.path.iterdir())):
    raise InputError(f"--output_dir={target.path}: is not empty; choose another folder")
  claim = _joined_claim(sources)
  runs = _runs(sources)
  tried: list[ComparisonFolder] = []
  if "planned" in claim:  # what was tried for a sweep that this comparison is not of stays where it is
    tried = [ComparisonFolder(source.path / SWEEP) for source in sources if (source.path / SWEEP).is_dir()]
  claim_of_tried, runs_of_tried = (_joined_claim(tried), _runs(tried)) if tried else ({}, {})
  texts = _report_texts(sources)
  with disk.whole_folder(target.path) as folder:
    _copy(runs, ComparisonFolder(folder), claim)
    if tried:
      _copy(runs_of_tried, ComparisonFolder(folder / SWEEP), claim_of_tried)
      write_tried(folder / TRIED, _sweep_lines(sources, claim))
    if texts:
      disk.write_json(folder / REPORT_FILE, texts)
  results = load_results(target.path)
  if results and texts:
    target.merge_metrics((result["arm"], result["seed"]) for result in results)
    write_report(target, results, console, **texts)
  elif results:
    said = "no report: no folder has a report.json of this version; the command without --shard, with --output_dir="
    console.print(f"{said}{target.path}, writes one", soft_wrap=True, highlight=False, markup=False)
  return _missing(claim, target)


def _joined_claim(sources: Sequence[ComparisonFolder]) -> dict[str, Any]:
  """Returns what all folders claim together."""
  claim: dict[str, Any] = {}
  for source in sources:
    known = source.known()
    if "arms" not in known or "config" not in known:
      raise InputError(f"{source.path}: holds no comparison (no config.json of one)")
    # Both ways: a longer run may continue a shorter one in its folder, and the order of folders says nothing.
    for old, new in ((claim, known), (known, claim)) if claim else ():
      changed = claim_differences(old, new)
      if changed:
        cure = "join folders of one command and one version of the code"
        if any(re.search(r"\binit_from was |\bdistil:teacher=", line) for line in changed):
          cure += ", with one path of the model (of --init_from, of the teacher) on all machines"
        raise InputError(
          f"{source.path}: is another comparison than {sources[0].path} ({'; '.join(changed[:3])}); {cure}"
        )
    claim = merged_claim(claim, known)
  return claim


def _runs(sources: Sequence[ComparisonFolder]) -> dict[tuple[str, int], pathlib.Path]:
  """Returns the folder of every finished run, by arm and seed.

  A run that several folders hold must have one result. The folder with the most evaluations of it is taken, the first
  of several.
  """
  found: dict[tuple[str, int], tuple[pathlib.Path, Result]] = {}
  for source in sources:
    for path in sorted(source.path.glob("arms/*/seed_*/result.json")):
      result = read_result(path)
      if not result:
        disk.note(f"{path}: is damaged and left out")
        continue
      key = result["arm"], result["seed"]
      if found:  # one that diverged has no versions, and one of before no digest of the code
        first, other = max(found.values(), key=lambda known: len(lookup(known[1], "versions") or {}))
        _check_same_code(source.path, result, first.parents[2], other)
        _check_same_start(path.parent, result, found)
      if key in found and lookup(found[key][1], "validation") != lookup(result, "validation"):
        raise InputError(
          f"{path.parent}: has another result than {found[key][0]}, of the same run; remove one of them"
        )
      if key not in found or _num_evaluations(result) > _num_evaluations(found[key][1]):
        found[key] = path.parent, result
  return {key: path for key, (path, _) in found.items()}


def _num_evaluations(result: Result) -> int:
  return len(result.get("evaluations", {}))


def _check_same_code(own: pathlib.Path, result: Result, first: pathlib.Path, other: Result) -> None:
  texts = [str(r.get("fingerprint"))[:12] for r in (result, other)]
  if result.get("fingerprint") != other.get("fingerprint"):
    raise InputError(
      f"{own}: has results on other text than {first} (fingerprint {texts[0]} and {texts[1]}); use the same "
      f"files and the same Python version on all machines"
    )
  for name, what in (("moe_jax", "moe_jax"), ("code", "code of moe_jax with digest")):
    versions = [lookup(r, "versions", name) for r in (result, other)]
    if None not in versions and versions[0] != versions[1]:
      raise InputError(
        f"{own}: has results of {what} {versions[0]}, and {first} of {versions[1]}; train both with one version"
      )


def _check_same_start(
  own: pathlib.Path, result: Result, found: Mapping[tuple[str, int], tuple[pathlib.Path, Result]]
) -> None:
  for folder, digest in starts_of([result]).items():
    for path, other in found.values():
      if (known := starts_of([other]).get(folder, digest)) != digest:
        raise InputError(
          f"{own}: started from other parameters in {folder} (digest {digest}) than {path} ({known}); train both from one model"
        )


def _copy(
  runs: Mapping[tuple[str, int], pathlib.Path], target: ComparisonFolder, claim: Mapping[str, Any]
) -> None:
  ignore = shutil.ignore_patterns(locks.LOCK, f"{disk.WRITING}*")
  for (arm, seed), path in runs.items():
    try:
      shutil.copytree(path, target.run(arm, seed), ignore=ignore)
    except shutil.Error as error:  # of all files that could not be copied; it has no number
      file, _, why = error.args[0][0]
      raise InputError(
        f"{file}: cannot be copied ({why}); mend that, and join again. Number of such files: {len(error.args[0])}"
      ) from error
  target.claim(claim)


def _sweep_lines(sources: Sequence[ComparisonFolder], claim: Mapping[str, Any]) -> list[dict[str, str]]:
  paths = [source.path / TRIED for source in sources]
  lines = [line for path in paths if path.exists() for line in read_tried(path)]
  lines = list({(line["arm"], line["value"]): line for line in lines}.values())
  order = list(claim["planned"])
  return sorted(lines, key=lambda line: order.index(line["arm"]))


def _report_texts(sources: Sequence[ComparisonFolder]) -> dict[str, Any]:
  """Returns the texts of all folders. {} if none has come to its report."""
  each = [texts for texts in (read_texts(source.path) for source in sources) if texts]
  return merged_texts(each) if each else {}


def _is_shorter(result: Result, arm: str, claim: Mapping[str, Any]) -> bool:
  """Returns whether a longer run was asked for since, and no shard has finished it."""
  asked = {**claim["config"].get("train", {}), **dict(claim["arms"])[arm]}.get("num_steps")
  had = steps_asked(result)
  return had is not None and isinstance(asked, int) and had < asked


def _missing(claim: Mapping[str, Any], target: ComparisonFolder) -> list[str]:
  missing = [
    f"{arm} seed {seed}"
    for arm in claim["arms"]
    for seed in claim["seeds"]
    if not (result := target.result(arm, seed)) or _is_shorter(result, arm, claim)
  ]
  undecided = [arm for arm, names in claim.get("planned", {}).items() if not {*names} & claim["arms"].keys()]
  return missing + [f"{arm} (what the sweep would choose)" for arm in undecided]
