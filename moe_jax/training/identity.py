"""Which run a folder holds: config.json says its configuration and its text, and another one is refused."""

import contextlib
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from moe_jax import disk, locks
from moe_jax.cluster import processes
from moe_jax.config import Config
from moe_jax.config.plain import is_other_code, own_code
from moe_jax.data import Dataset
from moe_jax.errors import InputError
from moe_jax.training.changes import changes
from moe_jax.training.compiled import objective_of
from moe_jax.training.load import CHECKPOINTS, CONFIG_FILE
from moe_jax.training.own_metrics import changed_metrics, metrics_said, own_metrics
from moe_jax.training.protocol import slots_of_mesh
from moe_jax.training.reading import read_beside
from moe_jax.training.result_file import RESULT_FILE, read_result, steps_asked
from moe_jax.training.tokenizer import write_tokenizer

# What is kept of a run where there is any, beside its configuration and its text.
_OPTIONAL = ("slots", "own_code", "own_metrics", "teacher")


def write_identity(folder: pathlib.Path, config: Config, dataset: Dataset) -> None:
  """Writes what `load` needs to make the model again, and what `check_same_run` compares."""
  of_tokenizer = write_tokenizer(folder, dataset.tokenizer)
  info = dataset.info
  of_text = {"vocab_size": info.vocab_size, "domains": list(info.domains), "fingerprint": info.fingerprint}
  known = disk.read_object(folder / CONFIG_FILE) or {}
  metrics = metrics_said(known) | own_metrics()  # also those that were measured before, and are not now
  found = (slots_of_mesh(config), own_code(config), metrics, objective_of(config).digest)
  optional = dict(zip(_OPTIONAL, found, strict=True))
  kept = {name: value for name, value in optional.items() if value}
  disk.write_json(folder / CONFIG_FILE, config.to_dict() | of_text | of_tokenizer | kept)


def check_same_text(text: str) -> None:
  """Raises `InputError`, in all processes, if they read different texts. `text`: the fingerprint."""
  processes.check_agree(text, "--dataset: fingerprint of the text", "all processes must read the same text")


def check_same_code(configs: Iterable[Config]) -> None:
  """Raises `InputError`, in all processes, if code of a user's in resolved configurations or metrics differs in them."""
  own = {code for config in configs for code in own_code(config)}
  own |= {f"{name} [{digest}]" for name, digest in own_metrics().items()}
  processes.check_agree(sorted(own), "--plugins: own code", "all processes must have the same files")


def other_fingerprint(was: str, now: str) -> str:
  """Says that a text has another fingerprint, and what may be the reason."""
  return (
    f"fingerprint {was[:12]}, now {now[:12]}: other files, another Python version, or another name of --text_folder, "
    "which is the domain of the files at its top"
  )


def check_same_run(folder: pathlib.Path, config: Config, text: str) -> None:
  """Raises `InputError`, in all processes, if the folder holds another run, or texts or code of a user's differ in them.

  A config.json that cannot be read is moved aside, or refused where it cannot be moved. What it says is in every
  checkpoint and in the result, too.

  Args:
    folder: of the run; may be new.
    config: resolved.
    text: the fingerprint.
  """
  check_same_text(text)
  check_same_code([config])
  teacher = teacher_of(config)
  with processes.refused_together():
    if processes.is_first() and (refused := refusal(folder, config, text, teacher)):
      raise InputError(refused)


def start_folder(config: Config) -> str:
  """Returns the folder that a run starts from; empty: none."""
  return config.train.init_from.replace("{seed}", str(config.train.seed))


def teacher_of(config: Config) -> str:
  """Returns the digest of the teacher that a run would have; empty: it has none, or none that can be read. All processes must call it."""
  try:
    return objective_of(config).digest
  except InputError:  # a finished run needs none, and one that trains says why
    return ""


def refusal(folder: pathlib.Path, config: Config, text: str, teacher: str = "") -> str:
  """Returns the line with which `check_same_run` refuses; empty if it does not."""
  return difference(f"{folder}: holds a run", _known(folder), config, text, teacher)


def difference(what: str, known: Mapping[str, Any], config: Config, text: str, teacher: str = "") -> str:
  """Returns a line that says how `config` on `text` is another run than the known one; empty if it is not.

  Args:
    what: begins the line: "FOLDER: holds a run".
    known: as config.json has it; {}: nothing is known.
    config: resolved.
    text: the fingerprint.
    teacher: see `teacher_of`.
  """
  was = str(known.get("fingerprint", text))
  if was != text:
    return (
      f"{what} on other text ({other_fingerprint(was, text)}); bring that text back, or choose another folder"
    )
  changed = changes(known, config.to_dict()) if known else []
  if changed:
    return f"{what} with another configuration ({'; '.join(changed[:3])}); choose another folder"
  own = own_code(config)
  then = known.get("own_code", own)  # a folder of before does not have it
  if is_other_code(then, own):
    return (
      f"{what} with other code of {'; '.join(map(str, then))} (now: {'; '.join(own)}); bring it back, or "
      "choose another folder"
    )
  if metrics := changed_metrics(metrics_said(known), own_metrics()):
    return (
      f"{what} with other code of the metric {'; '.join(metrics)}; bring it back, register the new one under another name, "
      "or choose another folder"
    )
  if teacher and known.get("teacher", teacher) != teacher:
    return f"{what} with another teacher (digest {known['teacher']}, now {teacher}); bring it back, or choose another folder"
  slots = slots_of_mesh(config)
  before = known.get("slots", slots)
  if slots and before != slots:
    return (
      f"{what} on a mesh on which other groups share slots, so other tokens would be dropped (then: "
      f"{before!r}; now: {slots!r}); use a mesh that splits the batch and the experts as before, or choose another folder"
    )
  return ""


def is_shorter(folder: pathlib.Path, config: Config) -> bool:
  """Returns whether the result in the folder is that of the same run with fewer steps.

  config.json may already say more steps: that of a longer run which was stopped.
  """
  asked = steps_asked(read_result(folder / RESULT_FILE))
  return asked is not None and asked < config.train.num_steps


def _known(folder: pathlib.Path) -> dict[str, Any]:
  path = folder / CONFIG_FILE
  disk.set_aside_damaged(path, folder, "it is written again from the flags")
  return disk.read_object(path) or _known_elsewhere(folder)


def said_by(extra: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what a checkpoint says of its run, as config.json has it. `extra`: what is kept beside its arrays."""
  more = {name: extra[name] for name in _OPTIONAL if extra.get(name)}
  return {**extra["config"], "fingerprint": extra["text"]} | more


def _known_elsewhere(folder: pathlib.Path) -> dict[str, Any]:
  """Returns what the newest checkpoint that can be read, or else the result, says of configuration and text."""
  steps = [p for p in (folder / CHECKPOINTS).glob("*") if p.name.isdecimal()]
  for path in sorted(steps, key=lambda p: int(p.name), reverse=True):
    with contextlib.suppress(InputError):  # of another version: restoring it says so, in all processes
      kept = read_beside(path).kept
      if kept and isinstance(kept["extra"].get("config"), dict):
        return said_by(kept["extra"])
  result = read_result(folder / RESULT_FILE)
  if "config" in result:
    of_run = {name: result[name] for name in ("fingerprint", *_OPTIONAL) if name in result}
    return of_run | result["config"]
  return {}


@contextlib.contextmanager
def hold(folders: Iterable[tuple[pathlib.Path, str]]) -> Iterator[None]:
  """Holds folders, each a (folder, name), in the first process for all.

  Raises:
    InputError: in all processes, if another command has one of them.
  """
  with contextlib.ExitStack() as stack:
    with processes.refused_together():
      for folder, name in folders if processes.is_first() else ():
        stack.enter_context(locks.hold(folder / locks.LOCK, name))
    yield
