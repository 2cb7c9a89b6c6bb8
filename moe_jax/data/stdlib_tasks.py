"""Instructions from the standard library: five small tasks on its functions, for tuning without a download.

  docstring  from the signature of a function to its docstring
  summary    from the rest of a docstring to its first line
  name       from the body of a function to its name
  reorder    from the shuffled lines of a function to their order
  continue   from the first half of a function to the second

Functions are those of modules outside the tests, with at most `FUNCTION_BYTES`. A module is of one split, by the sha256 of its
path, and a function that is in several modules is taken once, from the first of them, so no function is in both splits. Files are
read in the order of that hash until every task has `TASK_EXAMPLES`. The same library gives the same examples in the same order.
"""

import ast
import functools
import hashlib
import inspect
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import numpy as np

from moe_jax.data.prompts import Example
from moe_jax.data.stdlib_text import list_files, stdlib_root
from moe_jax.errors import InputError, unknown_name

FUNCTION_BYTES = 600  # longer functions are left out
TASK_EXAMPLES = 1500  # of each task; reading ends when all have so many
MIN_EXAMPLES = 8  # of each task and split; a library with less is refused
_VALIDATION_PART = 10  # one of so many modules is for validation
_NOT_READ = {"test", "tests", "idle_test"}
_Function = ast.FunctionDef | ast.AsyncFunctionDef


def read_tasks(
  held_out: Collection[str] = (), root: Path | None = None, examples: int = TASK_EXAMPLES
) -> dict[str, list[Example]]:
  """Returns the examples of `train` and `validation`. Tasks in `held_out` are in validation only.

  Args:
    held_out: names of tasks.
    root: the library to read; None: that of the running interpreter.
    examples: of each task, after which reading ends.

  Raises:
    InputError: if there is no such task, none is left to train on, or the library has too few functions.
  """
  for name in held_out:
    if name not in TASKS:
      raise unknown_name("task", name, TASKS)
  if set(held_out) >= set(TASKS):
    raise InputError(f"--held_out_tasks={','.join(held_out)}: no task is left to train on")
  splits = {split: list(found) for split, found in _read(root or stdlib_root(), examples).items()}
  few = min(sum(x.task == task for x in of_split) for of_split in splits.values() for task in TASKS)
  if few < MIN_EXAMPLES:
    raise InputError(
      f"--dataset=stdlib_tasks: this standard library has {few} examples of a task and split, at least {MIN_EXAMPLES} "
      "are needed; Python's own sources must be installed"
    )
  return without_shared({**splits, "train": [x for x in splits["train"] if x.task not in held_out]})


@functools.lru_cache(maxsize=2)
def _read(root: Path, examples: int) -> dict[str, list[Example]]:
  """The examples of all tasks by split: seconds of reading, for data sets that differ in how they are cut."""
  splits: dict[str, list[Example]] = {"train": [], "validation": []}
  counts, seen = dict.fromkeys(TASKS, 0), set()
  for path, split in _modules(root):
    for lines, node in _functions(path.read_text(encoding="utf-8", errors="replace")):
      key = fingerprint("".join(lines))
      if key in seen:
        continue
      seen.add(key)
      for task, make in TASKS.items():
        made = make(lines, node) if counts[task] < examples else None
        if made and made[1].strip():
          counts[task] += 1
          splits[split].append(Example(*made, task))
    if min(counts.values()) >= examples:
      break
  return splits


def without_shared(splits: dict[str, list[Example]]) -> dict[str, list[Example]]:
  """Returns `splits` without the training examples whose prompt, or prompt and response, is in validation, too."""
  held = {fingerprint(x.prompt) for x in splits["validation"]}
  return {**splits, "train": [x for x in splits["train"] if fingerprint(x.prompt) not in held]}


def fingerprint(text: str) -> str:
  """Returns a digest of a text up to white space."""
  return hashlib.sha256(" ".join(text.split()).encode(errors="replace")).hexdigest()


def _modules(root: Path) -> Iterator[tuple[Path, str]]:
  """Yields (path, split) of modules outside the tests, in the order of the hash of the path."""
  for name, _ in list_files(root):
    if name.endswith(".py") and not _NOT_READ & set(name.split("/")[:-1]):
      part = int(hashlib.sha256(f"tasks {name}".encode()).hexdigest(), 16) % _VALIDATION_PART
      yield root / name, "validation" if part == 0 else "train"


def _functions(source: str) -> Iterator[tuple[list[str], _Function]]:
  """Yields the dedented lines of every short function of a module, and its node in a tree of its own."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # invalid escapes in old modules
      tree = ast.parse(source)
  except (SyntaxError, ValueError):
    return
  lines = [f"{line}\n" for line in source.split("\n")]
  for node in ast.walk(tree):
    if isinstance(node, _Function) and not re.fullmatch(r"__\w+__", node.name):
      own = lines[node.lineno - 1 : node.end_lineno]
      text = inspect.cleandoc("\n" + "".join(own)) + "\n"
      if len(text.encode(errors="replace")) <= FUNCTION_BYTES and text.startswith(("def ", "async def ")):
        yield [f"{line}\n" for line in text.split("\n")[:-1]], node


def _parts(lines: Sequence[str], node: _Function) -> tuple[list[str], str, list[str]]:
  """Returns the lines of the signature, the docstring, and the lines of the body without it."""
  first = node.body[0]
  docstring = ast.get_docstring(node) or ""
  begin = first.lineno - node.lineno
  rest = first.end_lineno - node.lineno + 1 if docstring else begin
  return list(lines[:begin]), docstring, list(lines[rest:])


def _docstring(lines: Sequence[str], node: _Function) -> tuple[str, str] | None:
  signature, docstring, _ = _parts(lines, node)
  return (f"Write the docstring of:\n{''.join(signature)}", docstring) if docstring and signature else None


def _summary(lines: Sequence[str], node: _Function) -> tuple[str, str] | None:
  first, _, rest = _parts(lines, node)[1].partition("\n")
  rest = rest.strip()
  return (f"Sum up:\n{rest}\n", first) if first and rest else None


def _name(lines: Sequence[str], node: _Function) -> tuple[str, str] | None:
  signature, _, body = _parts(lines, node)
  hidden = re.sub(rf"\b{re.escape(node.name)}\b", "f", "".join(signature + body))
  return (f"Name this function:\n{hidden}", node.name) if body and signature else None


def _reorder(lines: Sequence[str], node: _Function) -> tuple[str, str] | None:
  signature, _, body = _parts(lines, node)
  code = signature + body
  if not 3 <= len(code) <= 8 or len(set(code)) < len(code):
    return None
  seed = int(fingerprint("".join(code))[:8], 16)
  order = np.random.default_rng(seed).permutation(len(code))
  if (order == np.arange(len(code))).all():
    order = order[::-1]
  return f"Sort these lines:\n{''.join(code[i] for i in order)}", "".join(code)


def _continue(lines: Sequence[str], node: _Function) -> tuple[str, str] | None:
  signature, _, body = _parts(lines, node)
  code = signature + body
  half = len(code) // 2
  if len(code) < 4 or half < len(signature):
    return None
  return f"Continue:\n{''.join(code[:half])}", "".join(code[half:])


TASKS: dict[str, Callable[[Sequence[str], _Function], tuple[str, str] | None]] = {
  "docstring": _docstring,
  "summary": _summary,
  "name": _name,
  "reorder": _reorder,
  "continue": _continue,
}
