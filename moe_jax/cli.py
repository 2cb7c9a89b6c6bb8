"""absl flags from the config dataclasses, and how entry points end on a wrong one."""

import contextlib
import dataclasses
import difflib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from absl import app, flags, logging

from moe_jax.cluster.signals import Between
from moe_jax.config import (
  Config,
  DataConfig,
  MeshConfig,
  ModelConfig,
  MoEConfig,
  OptimizerConfig,
  TrainConfig,
  spec_text,
)
from moe_jax.disk import note
from moe_jax.errors import (
  INTERRUPTED_STATUS,
  STOPPED_STATUS,
  InputError,
  Stopped,
  of_the_system,
  unknown_name,
)
from moe_jax.models import PRESETS, preset
from moe_jax.plugins import import_plugins

_RENAMED = {("mesh", field.name): f"{field.name}_parallelism" for field in dataclasses.fields(MeshConfig)}
_UNREAD_STATUS = 128 + signal.SIGPIPE
_DEFINERS = {
  bool: flags.DEFINE_bool,
  int: flags.DEFINE_integer,
  float: flags.DEFINE_float,
  str: flags.DEFINE_string,
}
_PARTS = {
  "model": ModelConfig,
  "moe": MoEConfig,
  "optimizer": OptimizerConfig,
  "data": DataConfig,
  "train": TrainConfig,
  "mesh": MeshConfig,
}


def _fields() -> Iterator[tuple[str, dataclasses.Field, str]]:
  """(part, field, flag name) of every field that is a flag: those with a help text."""
  for part, cls in _PARTS.items():
    for field in dataclasses.fields(cls):
      if "help" in field.metadata:
        yield part, field, _RENAMED.get((part, field.name), field.name)


def define_flags(leave_out: Iterable[str] = ()) -> None:
  """`--preset`, `--plugins` and one flag per config field, except those named in `leave_out`."""
  flags.DEFINE_string("preset", "default", f"base configuration: {', '.join(sorted(PRESETS))}")
  flags.DEFINE_list(
    "plugins", [], "Python files or modules that register methods of your own, imported before flags are read"
  )
  for _, field, flag in _fields():
    if flag not in leave_out:
      _DEFINERS[type(field.default)](flag, field.default, field.metadata["help"])


def config_from_flags(said: Mapping[str, Any] | None = None) -> Config:
  """The preset with the flags of the command line on top, not yet checked.

  Args:
    said: values of fields that a script has instead of those of the preset, where no flag gives one.

  Raises:
    InputError: unknown preset.
  """
  base = preset(flags.FLAGS.preset)
  values: dict[str, dict[str, Any]] = {part: {} for part in _PARTS}
  for part, field, flag in _fields():
    if flag in flags.FLAGS and flags.FLAGS[flag].present:
      values[part][field.name] = flags.FLAGS[flag].value
    elif field.name in (said or {}):
      values[part][field.name] = said[field.name]
  moe = dataclasses.replace(base.model.moe, **values.pop("moe"))
  parts = {part: dataclasses.replace(getattr(base, part), **given) for part, given in values.items()}
  config = Config(**parts | {"model": dataclasses.replace(parts["model"], moe=moe)})
  _note_without_effect(config)
  return config


# What mixers do not read, and which feed-forward parts read nothing of experts: their factories have no parameter of that
# name, which `tests/test_cli.py` checks.
_UNREAD = {"mla": ("num_kv_heads", "qk_norm"), "lightning": ("num_kv_heads", "rope_theta", "qk_norm")}
_WITHOUT_EXPERTS = ("mlp", "low_rank")


def _note_without_effect(config: Config) -> None:
  """Prints a line for each flag that was given and changes nothing beside the others."""
  data, train = config.data, config.train
  mixer, ffn = (spec_text(spec).partition(":")[0] for spec in (config.model.mixer, config.model.ffn))
  dropless = spec_text(config.model.moe.dispatcher).startswith("dropless")
  needs = {
    "--ffn with experts": (
      ffn not in _WITHOUT_EXPERTS,
      "router balancers experts dispatcher num_experts num_experts_per_token expert_dim num_shared_experts "
      "shared_experts shared_expert_dim shared_expert_gate group_size jitter capacity_factor eval_capacity_factor",
    ),
    "--dataset=markov": (data.dataset == "markov", "markov_domains markov_states markov_temperature"),
    "--dataset=text_folder": (data.dataset == "text_folder", "text_folder"),
    "--dataset=stdlib_tasks": (data.dataset == "stdlib_tasks", "held_out_tasks"),
    "a data set of prompts": (data.dataset == "stdlib_tasks" or _given("train_jsonl"), "pack_examples"),
    "a data set of text": (data.dataset != "markov", "tokenizer data_dir"),
    "a dispatcher with a capacity": (not dropless, "capacity_factor eval_capacity_factor"),
    "a schedule that decays": (config.optimizer.schedule != "constant", "final_learning_rate_fraction"),
    "a mixer that reads it": (mixer not in _UNREAD, " ".join(_UNREAD.get(mixer, ()))),
    "--record_router_logits": (train.record_router_logits > 0, "router_logits_dtype"),
  }
  said = set()
  for need, (is_met, names) in needs.items():
    for name in () if is_met else names.split():
      if _given(name) and name not in said:
        note(f"--{name} has no effect without {need}")
        said.add(name)


def given(*names: str) -> list[str]:
  """Returns which flags of a configuration, and which of `names`, are on the command line, be it with their defaults."""
  return [f"--{name}" for name in ("preset", *names, *(flag for *_, flag in _fields())) if _given(name)]


def _given(name: str) -> bool:
  """Returns whether a flag is on the command line."""
  return name in flags.FLAGS and flags.FLAGS[name].present


def run(main: Callable[[list[str]], None], takes_arguments: bool = False) -> None:
  """`app.run` that answers wrong input with one line on stderr and exit status 2.

  SIGTERM, SIGHUP and Ctrl-C end it with one line and `STOPPED_STATUS` or `INTERRUPTED_STATUS`. Only with `takes_arguments` may the command line have more
  than flags.
  """

  def parse(argv: list[str]) -> list[str]:
    try:
      rest = flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
      _fail(_unknown_flag(error.flagname), short=True)
    except flags.Error as error:
      _fail(error)
    if len(rest) > 1 and not takes_arguments:
      _fail(InputError(f"unexpected argument {rest[1]!r}: flags are written --name=value"))
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)  # libraries' progress notes, which are not about this run
    return rest

  def guarded(argv: list[str]) -> None:
    with one_line(), Between(of_program=True):
      if "plugins" in flags.FLAGS:
        import_plugins(flags.FLAGS.plugins)
      main(argv)
      sys.stdout.flush()  # a reader that is gone is noticed here, and not when Python ends

  app.run(guarded, flags_parser=parse)


@contextlib.contextmanager
def one_line() -> Iterator[None]:
  """Ends the process for what the user can correct or has asked for: one line on stderr, and an exit status.

  2 for wrong input and for files that cannot be used, 75 (`STOPPED_STATUS`) when a run has stopped and saved, 130 for
  Ctrl-C, and 141 without a line if nobody reads the output any more (`| head`).
  """
  try:
    yield
  except InputError as error:
    _fail(error)
  except BrokenPipeError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes when it ends
    sys.exit(_UNREAD_STATUS)
  except SystemExit as ended:
    if isinstance(ended.__context__, BrokenPipeError):  # rich does the same, with status 1
      sys.exit(_UNREAD_STATUS)
    raise
  except OSError as error:  # a disk that is full, a folder that is gone, a name that is too long
    line = of_the_system(error)
    if line is None:
      raise
    _fail(line)
  except Stopped as stopped:
    print(stopped, file=sys.stderr)
    sys.exit(STOPPED_STATUS)
  except KeyboardInterrupt:
    print("\nstopped; what is finished is kept, and the same command continues", file=sys.stderr)
    sys.exit(INTERRUPTED_STATUS)


def _unknown_flag(name: str) -> InputError:
  """Returns the error for a flag that the script does not have. It may be of a field that the script sets itself."""
  own = {f"--{flag}" for flag in _own_flags()}
  of_fields = {f"--{flag}" for *_, flag in _fields()}
  near = difflib.get_close_matches(f"--{name}", own | of_fields, n=1, cutoff=0.5)
  misspelt = difflib.get_close_matches(f"--{name}", own, n=1, cutoff=0.85)
  if not misspelt and own & of_fields and near and near[0] not in own:
    return InputError(f"unknown flag '--{name}': this command sets what {near[0]} would;")
  return unknown_name("flag", f"--{name}", own)


def _own_flags() -> list[str]:
  """The flags of the script and its configs, without absl's own."""
  return [name for name, flag in flags.FLAGS._flags().items() if not _is_absl(flag)]


def _is_absl(flag: flags.Flag) -> bool:
  module = flags.FLAGS.find_module_defining_flag(flag.name) or ""
  return module.startswith("absl")


def _fail(error: Exception, short: bool = False) -> None:
  line = " ".join(str(error).split())
  if short:
    line = line.split(" known: ")[0] + " --help lists all"
  print(f"error: {line}", file=sys.stderr)
  sys.exit(2)


@contextlib.contextmanager
def said(what: str) -> Iterator[None]:
  """Says on stderr what runs now, and then how long it took."""
  print(f"{what} ...", end=" ", file=sys.stderr, flush=True)
  start = time.perf_counter()
  try:
    yield
  except BaseException:  # what is said of it has a line of its own
    print(file=sys.stderr)
    raise
  print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
