"""Models that are made without training, measured as the arms of a comparison: resumable, and paired by the seed of their model."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx
from rich.console import Console

from moe_jax.analysis.accounting.parameters import count
from moe_jax.analysis.kept import Kept
from moe_jax.comparison.folder import ComparisonFolder
from moe_jax.comparison.reporting import write_report
from moe_jax.config.plain import is_other_code, own_code
from moe_jax.data import Dataset
from moe_jax.data.text_folder import check_outside
from moe_jax.errors import InputError
from moe_jax.inference.evaluate import ALL, Score
from moe_jax.nn.transformer import Transformer
from moe_jax.training.changes import changes, differences
from moe_jax.training.digests import tree_digest
from moe_jax.training.load import Loaded, check_finished
from moe_jax.training.results import table_columns, versions


def models_of(model: str, seeds: int) -> list[str]:
  """Returns the folder of each seed.

  Raises:
    InputError: if there are several seeds and one folder, or one of several runs is not finished.
  """
  if seeds > 1 and "{seed}" not in model:
    raise InputError(f"--seeds={seeds}: --model={model} names one model; put {{seed}} where the seed is")
  folders = [model.replace("{seed}", str(seed)) for seed in range(seeds)]
  if seeds > 1:  # a mean of shorter and longer runs says nothing
    for folder in folders:
      check_finished(pathlib.Path(folder))
  return folders


class Numbers(NamedTuple):
  """What was measured of one model."""

  scores: dict[str, Score]  # by domain, as `evaluate` returns them
  others: dict[str, Any]


class Measured:
  """Results of arms that were not trained, in the folder of a comparison.

  Args:
    folder: new, or that of an earlier command.
    settings: what the numbers depend on beside the arms and seeds. `batches` is the limit of an evaluation; 0: none.

  Raises:
    InputError: if the folder has numbers of other settings.
  """

  def __init__(self, folder: pathlib.Path, settings: Mapping[str, Any]):
    self.folder, self.kept = ComparisonFolder(folder), Kept(folder, settings)
    self.eval_batches = settings.get("batches", 0)
    self.results: list[dict[str, Any]] = []

  def __call__(
    self,
    arm: str,
    seed: int,
    loaded: Loaded,
    dataset: Dataset,
    measure: Callable[[], tuple[Transformer, Mapping[str, Score], Mapping[str, Any]]],
  ) -> "Numbers":
    """Returns what was measured of a model.

    Args:
      arm, seed: its name in the table.
      loaded: what it was made of.
      dataset: what it was measured on.
      measure: makes it, if an earlier command did not, and returns it, what `evaluate` says, and further numbers, of which
        `max_vio` is a column of the table.

    Raises:
      InputError: if the folder has a result on other text, of another model, or with other code of a user's method. What
        a result of an older version does not say is not compared.
    """
    check_outside(self.folder.path, dataset.config)
    own = {
      "eval_batches": self.eval_batches,
      "own_code": own_code(loaded.config),
      "made_of": _beside_parameters(loaded),
    }
    make = lambda: _result(arm, seed, loaded, dataset, *measure()) | own
    path = self.folder.run(arm, seed).relative_to(self.folder.path) / "result"
    found = self.kept(str(path), make)
    known = found["fingerprint"], found["init_from"]["digest"]
    if known != (dataset.info.fingerprint, _digest(loaded.model)):
      raise InputError(
        f"--output_dir={self.folder.path}: {arm} seed {seed} is of another model or text; choose another folder"
      )
    if is_other_code(found.get("own_code", own["own_code"]), own["own_code"]):
      raise InputError(
        f"--output_dir={self.folder.path}: {arm} seed {seed} was measured with other code of "
        f"{'; '.join(map(str, found['own_code']))} (now: {'; '.join(own['own_code'])}); choose another folder"
      )
    if changed := _changed(found.get("made_of", own["made_of"]), own["made_of"]):
      raise InputError(
        f"--output_dir={self.folder.path}: {arm} seed {seed} is of the same parameters with other settings or states "
        f"({'; '.join(changed[:3])}); choose another folder"
      )
    self.results.append(found)
    return Numbers({name: Score(*score) for name, score in found["scores"].items()}, found["others"])

  def report(self, command: str, **texts: Any) -> None:
    """Prints the table, and writes the report of a comparison, whose baseline is the first arm."""
    names: Sequence[str] = list(dict.fromkeys(result["arm"] for result in self.results))
    ordered = sorted(self.results, key=lambda result: (names.index(result["arm"]), result["seed"]))
    write_report(self.folder, ordered, Console(), commands=[command], **texts)


def _result(
  arm: str,
  seed: int,
  loaded: Loaded,
  dataset: Dataset,
  model: Transformer,
  scores: Mapping[str, Score],
  others: Mapping[str, Any],
) -> dict[str, Any]:
  counted, score = count(model), scores[ALL]
  validation = {"nll": score.nll, "perplexity": score.perplexity, "num_targets": score.num_targets}
  if score.bits_per_byte is not None:
    validation["bits_per_byte"] = score.bits_per_byte
  if "max_vio" in others:
    validation["max_vio"] = others["max_vio"]
  return {
    "arm": arm,
    "seed": seed,
    "dataset": dataset.info.name,
    "fingerprint": dataset.info.fingerprint,
    "domains": list(dataset.info.domains),
    "num_params": counted.parameters.total,
    "num_active_params": counted.active_at_most.all,
    "init_from": {"folder": str(loaded.folder), "digest": _digest(loaded.model)},
    "columns": table_columns(),
    "validation": validation,
    "scores": {name: list(score) for name, score in scores.items()},
    "others": dict(others),
    "versions": versions(),
    "device": f"{jax.devices()[0].device_kind} x {jax.device_count()}",
  }


def _digest(model: Transformer) -> str:
  return tree_digest(nnx.state(model, nnx.Param))


def _beside_parameters(loaded: Loaded) -> dict[str, Any]:
  """Returns what else decides what a model computes: its configuration, and biases of balancers and other variables."""
  variables = tree_digest(nnx.state(loaded.model, nnx.Not(nnx.Param)))
  return {"model": loaded.config.to_dict()["model"], "variables": variables}


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  """Returns a text for everything in which two values of `_beside_parameters` differ. A missing field has its default."""
  of_models = changes({"model": old["model"]}, {"model": new["model"]})
  return of_models + differences(old["variables"], new["variables"], "variables")
