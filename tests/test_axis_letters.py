"""An axis letter has the meaning that the docstring of `moe_jax.types` gives it, in names, in prose, and at run time."""

import ast
import contextlib
import functools
import pathlib
import re
import sys

import jax
import pytest

import moe_jax.types
from moe_jax import sharding
from moe_jax.analysis.ahead_of_time import abstract_batch
from moe_jax.config import MeshConfig
from moe_jax.training.compiled import make_init, make_train_step, resolve_config
from tests import tiny

PACKAGE = pathlib.Path(moe_jax.types.__file__).parent
# What a text may count with which letters, as in "P devices".
COUNTED = {
  "assignments": "A",
  "bins": "Q",
  "chunks": "J",
  "devices": "PW",
  "domains": "S",
  "experts": "EKOZ",
  "groups": "GPW",
  "heads": "N",
  "layers": "R",
  "micro-batches": "J",
  "nodes": "PW",
  "sequences": "B",
  "slots": "C",
  "units": "U",
}
# A suffix is upper case, behind a name that is lower case: `_query_BLNH`, not `MASK_BL` or `BertLayer`.
SUFFIX = re.compile(r"_*[a-z]\w*?_([A-Z][A-Z0-9]*|[0-9]+[A-Z][A-Z0-9]*)")


def read_legend(docstring: str) -> dict[str, str]:
  """Letter -> meaning. Entries begin their line or follow two spaces; "X, Y any axis" has two letters."""
  legend = {}
  for line in docstring.splitlines():
    for letters, meaning in re.findall(r"(?<=  )((?:[A-Z], )*[A-Z]) (\S+(?: \S+)*)", line):
      for letter in letters.split(", "):
        assert letter not in legend, f"{letter} is in the legend twice"
        legend[letter] = meaning
  return legend


LEGEND = read_legend(moe_jax.types.__doc__)


def names(tree: ast.AST) -> set[str]:
  """Every identifier of a file."""
  fields = {
    ast.Name: "id",
    ast.Attribute: "attr",
    ast.arg: "arg",
    ast.keyword: "arg",
    ast.FunctionDef: "name",
  }
  return {getattr(node, fields[type(node)]) or "" for node in ast.walk(tree) if type(node) in fields}


def unknown_letters(tree: ast.AST) -> list[str]:
  suffixes = ((name, SUFFIX.fullmatch(name)) for name in names(tree))
  return sorted(name for name, found in suffixes if found and set(found[1]) - set(LEGEND) - set("0123456789"))


def other_meanings(source: str) -> list[str]:
  """Where a text says "M groups", or has letters of its own."""
  found = re.findall(r"[Ll]etters? of this file.*|[Ff]urther axes.*", source)
  for letter, noun in re.findall(rf"(?<![\w*/+^(-])([A-Z]) ({'|'.join(COUNTED)})\b", source):
    found += [f"{letter} {noun}"] if letter not in COUNTED[noun] else []
  return found


@pytest.mark.parametrize("path", sorted(p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py")))
def test_names_and_prose_follow_the_legend(path):
  source = (PACKAGE / path).read_text()
  found = unknown_letters(ast.parse(source)) + other_meanings(source)
  assert not found, found


def test_the_legend_has_every_letter_once_and_the_checks_find_what_is_wrong():
  assert len(LEGEND) == 26 and LEGEND["X"] == LEGEND["Y"] == "any axis"
  assert read_legend("\n  B batch   C capacity (of one)\n  X, Y any axis\n") == {
    "B": "batch", "C": "capacity (of one)", "X": "any axis", "Y": "any axis"
  }  # fmt: skip
  assert other_meanings("M groups of P experts") == ["M groups", "P experts"]
  assert not other_meanings("K of E experts, (M groups), B*L tokens of G groups")


# --- at run time ---

# The sizes that a letter can have in the configurations below; several where accumulation, grouped queries or a mesh
# cut an axis. What is not here (T, G, C, A, X, ...) need only be the same throughout one call.
SIZES = {
  "B": {6, 3, 1}, "L": {20}, "D": {24}, "F": {14}, "E": {8, 4}, "K": {3}, "N": {4, 2}, "H": {10}, "V": {34}, "R": {2},
  "P": {4, 2}, "Q": {50}, "Z": {5},
}  # fmt: skip
LEADING = {"ops/stats.py"}  # its functions take further axes in front


def fits(name: str, shape: tuple[int, ...], in_this_call: dict[str, int], leading: bool) -> bool:
  """Whether the suffix of `name` says what `shape` has. Enters its sizes into `in_this_call`."""
  letters = SUFFIX.fullmatch(name)[1]
  shape = shape[-len(letters) :] if leading else shape
  right = len(shape) == len(letters)
  for letter, size in zip(letters, shape):
    if letter.isdigit():
      right &= int(letter) == size
    else:
      right &= size in SIZES.get(letter, {size})
      right &= in_this_call.setdefault(letter, size) == size or letter == "N"  # of queries, of keys
  return right


@contextlib.contextmanager
def misnamed_arrays():
  """A set that collects (file, function, name, shape) of local arrays in the package, whose suffix is wrong."""
  found = set()

  @functools.cache
  def checked(code):
    """The names to look at; none outside of the package."""
    names = (*code.co_varnames, *code.co_cellvars, *code.co_freevars)
    is_own = code.co_filename.startswith(str(PACKAGE))
    return [name for name in names if is_own and SUFFIX.fullmatch(name)]

  def on_call(frame, event, _):
    if checked(frame.f_code):
      frame.f_trace_lines = False
      return on_return
    return None

  def on_return(frame, event, _):
    if event == "return":
      path, sizes = pathlib.Path(frame.f_code.co_filename).relative_to(PACKAGE).as_posix(), {}
      values = frame.f_locals
      for name in checked(frame.f_code):
        shape = getattr(values.get(name), "shape", None)
        if isinstance(shape, tuple) and not fits(name, shape, sizes, path in LEADING):
          found.add((path, frame.f_code.co_name, name, shape))
    return on_return

  before = sys.gettrace()  # of coverage, or of a debugger
  sys.settrace(on_call)
  try:
    yield found
  finally:
    sys.settrace(before)


CONFIG = tiny.change(
  tiny.CONFIG,
  model_dim=24, num_heads=4, num_kv_heads=2, head_dim=10, dense_dim=18, expert_dim=14,
  num_experts_per_token=3, group_size=10, batch_size=6, sequence_length=20, accumulation=2, remat="none",
)  # fmt: skip
BALANCERS = (
  "switch_loss", "switch_loss:scope=sequence", "st_moe_loss", "gshard_loss:scope=buffer", "sequence_loss",
  "device_loss:devices=4", "communication_loss:devices=4:devices_per_token=3", "squared_deviation_loss:of=load",
  "squared_deviation_loss", "adaptive_loss", "entropy_loss", "importance_loss", "z_loss", "loss_free_bias",
  "quantile_balancing:bins=50", "smebu",
)  # fmt: skip
ON_TWO = {"mesh": MeshConfig(data=1, expert=2), "accumulation": 1}
PROGRAMS = (
  {"dispatcher": "sorted", "balancers": ",".join(BALANCERS)},
  {"dispatcher": "einsum", "balancers": "load_loss", "router": "noisy_topk", "accumulation": 1},
  {"dispatcher": "dropless", "balancers": "none", "ffn": "erc_moe", "accumulation": 1},
  {"dispatcher": "all_to_all:chunks=2:buffer_factor=2:exchange=padded", "balancers": "none", **ON_TWO},
  {"dispatcher": "all_gather:capacity=global", "balancers": "none", **ON_TWO},
)


def test_arrays_have_the_axes_of_their_names():
  """In every call of a traced training step a suffix gives the number of axes, and each letter stands for one size."""
  wrong = set()
  for changed in PROGRAMS:
    config = resolve_config(tiny.change(CONFIG, **changed))
    with jax.set_mesh(sharding.make_mesh(config.mesh)), misnamed_arrays() as found:
      state = jax.eval_shape(make_init(config, 34), 0)
      jax.eval_shape(make_train_step(config, 34, tiny.DOMAINS), state, abstract_batch(config))
    wrong |= found
  assert not wrong, sorted(wrong, key=str)


def test_a_wrong_suffix_is_found():
  assert fits("x_BLD", (3, 20, 24), {}, False) and fits("_by_expert_E", (2, 8), {}, True)
  assert not fits("x_BLD", (20, 24), {}, False)  # an axis is missing
  assert not fits("load_D", (4,), {}, False)  # devices are no model dimension
  assert not fits("count_B1", (3, 20), {}, False)
  assert not fits("y_XD", (7, 24), {"X": 9}, False)  # another size in the same call
