"""Imports go in one direction only. Walks the ast of every source file and fails on imports missing from the table."""

import ast
import pathlib
import sys
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

ANY = None
# Standard library that neither reads nor changes the world outside.
PURE = {
  "abc",
  "collections",
  "dataclasses",
  "enum",
  "fractions",
  "functools",
  "inspect",
  "itertools",
  "math",
  "operator",
} | {
  "re",
  "types",
  "typing",
}
JAX = {"jax", "flax", "optax", "orbax", "chex"}


class Part(NamedTuple):
  """What one part of the project may import, besides itself."""

  project: str = ""  # names of parts, separated by spaces
  outside: set[str] | None = ANY  # top-level packages; ANY: whatever is installed
  stdlib: set[str] | None = ANY
  never: set[str] = frozenset()  # top-level packages


MODEL = "nn ops types sharding config models errors registry"
RUN = f"training data cluster disk locks {MODEL}"

# experiments, scripts, notebooks -> comparison, analysis -> training -> nn -> sharding -> ops -> types.
# A new file or folder directly under moe_jax/ needs a row here; one below it may have a stricter row of its own.
GRAPH = {
  # leaves
  "errors": Part(outside=set()),
  "types": Part(outside={"jax", "numpy"}, stdlib=PURE),
  "fingerprint": Part(outside=set()),
  "registry": Part("errors fingerprint", outside=set()),
  "disk": Part("errors", outside=set()),
  "locks": Part("disk errors", outside=set()),
  "plugins": Part("errors", outside=set()),
  "config": Part("errors registry fingerprint", outside=set()),
  "models": Part("config errors registry"),
  "cli": Part("cluster.signals config disk models errors registry plugins", never=JAX),
  "cluster": Part("errors fingerprint"),
  "cluster.abort": Part(outside=set()),  # also a program of its own
  "cluster.watch": Part("cluster.abort errors", outside=set()),
  "cluster.signals": Part("cluster.watch errors", outside=set()),
  "cluster.processes": Part("errors", outside={"jax", "numpy"}),
  # arrays in, arrays out
  "ops": Part("types errors registry", outside={"jax", "numpy"}, stdlib=PURE),
  # the model
  "sharding": Part("ops types config errors registry", outside={"jax", "flax", "numpy"}),
  "nn": Part("ops types sharding config errors registry fingerprint", outside={"jax", "flax", "numpy"}),
  # around it
  "data": Part("config disk errors registry"),
  "training": Part(f"data cluster disk fingerprint locks {MODEL}"),
  "training.step": Part(f"training {MODEL}", never={"orbax", "grain"}),
  "training.metric_writer": Part("config disk errors", never=JAX),
  "training.result_file": Part("disk", never=JAX),
  "training.progress": Part("errors", never=JAX),
  "training.router_trace": Part("training.trace_files disk errors", never=JAX),
  "training.trace_files": Part("disk errors", outside={"numpy"}),
  "interop": Part(RUN),
  "interop.families": Part("interop.source config errors registry ops"),
  "interop.safetensors": Part("disk errors", never=JAX),
  "interop.layout": Part(outside={"numpy"}),
  "interop.source": Part("interop.layout", outside=set()),
  "inference": Part(f"interop {RUN}"),
  # model in, model out
  "adapt": Part(f"data disk {MODEL}", outside={"jax", "flax", "numpy", "scipy"}),
  "comparison": Part(f"fingerprint {RUN}"),
  "comparison.arms": Part("config errors registry nn ops"),
  "comparison.report": Part("comparison training.metric_writer disk config errors", never=JAX),
  "comparison.results": Part("training.metric_writer training.result_file disk errors", never=JAX),
  "comparison.facts": Part("comparison.results errors", never=JAX),
  "comparison.findings": Part("comparison.differences comparison.report errors", never=JAX),
  "comparison.statistics": Part("comparison.facts comparison.results errors", never=JAX),
  "comparison.differences": Part("comparison.statistics comparison.results errors", never=JAX),
  "analysis": Part(RUN),
  "analysis.kept": Part(f"fingerprint {RUN}"),
  "analysis.accounting": Part(f"analysis interop {RUN}"),
  "analysis.capacity": Part(f"analysis comparison {RUN}"),
  "analysis.measured": Part(f"analysis comparison inference interop {RUN}"),
  "analysis.deployment": Part(f"analysis adapt inference interop comparison.report {RUN}"),
  "analysis.examine": Part(f"analysis interop comparison.report {RUN}"),
  "analysis.replay": Part(f"analysis comparison.report {RUN}"),
  "analysis.communication": Part(
    "analysis analysis.replay comparison.report training.router_trace disk nn config ops types errors",
    never={"flax", "optax"},
  ),
  # the top
  "moe_jax": Part(f"comparison analysis adapt inference interop {RUN}"),  # __init__.py: the public names
  "experiments": Part(f"comparison analysis adapt inference interop cli moe_jax {RUN}"),
  "scripts": Part(f"comparison analysis adapt inference interop cli moe_jax experiments {RUN}"),
}
TOP = {"experiments", "scripts", "tests", "notebooks"}


def part_of(module: str) -> str | None:
  """The most particular row that a dotted name belongs to; None for what is not of this project."""
  first, _, rest = module.partition(".")
  if first != "moe_jax":
    return first if first in TOP else None
  words = rest.split(".")
  rows = (".".join(words[:n]) for n in range(len(words), 0, -1))
  return next((row for row in rows if row in GRAPH), words[0] or "moe_jax")


def may_import(own: str, to: str) -> bool:
  """Whether the row of `own` allows `to`: itself and what is below it, or what it names and what is below that."""
  return any(to == name or to.startswith(f"{name}.") for name in (own, *GRAPH[own].project.split()))


def imported_modules(tree: ast.AST, package: str) -> list[tuple[int, str]]:
  """(line, absolute dotted name) of every import, also inside functions. `package` holds the file."""
  found = []
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      found += [(node.lineno, alias.name) for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ""
      if node.level:
        parents = package.split(".")[: len(package.split(".")) - node.level + 1]
        base = ".".join([*parents, base] if base else parents)
      if base == "moe_jax":  # `from moe_jax import config` imports the part; __version__ belongs to no part
        names = [alias.name for alias in node.names if not alias.name.startswith("__")]
        found += [(node.lineno, f"moe_jax.{name}" if name in GRAPH else "moe_jax") for name in names]
      elif base.startswith("moe_jax."):  # a name may be a module with a row of its own
        names = [f"{base}.{alias.name}" for alias in node.names]
        found += [(node.lineno, name if name.removeprefix("moe_jax.") in GRAPH else base) for name in names]
      else:
        found.append((node.lineno, base))
  return found


def violations(source: str, path: str) -> list[str]:
  """One line for each import in the file at `path` (relative to the root) that the graph does not have."""
  module = path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
  package = module if path.endswith("__init__.py") else module.rpartition(".")[0]
  own = part_of(module)
  if own not in GRAPH:
    return [f"{path}: {own} has no row in the table of tests/test_imports.py"]
  part, wrong = GRAPH[own], []
  for line, target in imported_modules(ast.parse(source, path), package):
    to, root = part_of(target), target.partition(".")[0]
    if to is not None:
      ok = may_import(own, to)
    elif root in sys.stdlib_module_names:
      ok = part.stdlib is ANY or root in part.stdlib
    else:
      ok = (part.outside is ANY or root in part.outside) and root not in part.never
    if not ok:
      wrong.append(f"{path}:{line}: {own} must not import {target}")
  return wrong


SOURCES = sorted(
  path.relative_to(ROOT).as_posix()
  for folder in ("moe_jax", "experiments", "scripts")
  for path in (ROOT / folder).rglob("*.py")
)


def test_imports_point_one_way():
  found = [line for path in SOURCES for line in violations((ROOT / path).read_text(), path)]
  assert not found, "\n".join(found)


def test_the_graph_has_no_cycle():
  finished = set()

  def visit(name, above):
    assert name not in above, f"cycle: {' -> '.join([*above, name])}"
    if name not in finished:
      for below in GRAPH[name].project.split():
        if not name.startswith(f"{below}."):  # a part of a room may use the room
          visit(below, [*above, name])
      finished.add(name)

  for name in GRAPH:
    visit(name, [])


@pytest.mark.parametrize(
  ("path", "source", "target"),
  [
    ("moe_jax/ops/stats.py", "from moe_jax.config import MoEConfig", "moe_jax.config"),
    ("moe_jax/ops/stats.py", "def f():\n  import flax.nnx as nnx", "flax.nnx"),
    ("moe_jax/ops/stats.py", "import os", "os"),
    ("moe_jax/ops/routing/topk.py", "from ...nn import moe", "moe_jax.nn"),
    ("moe_jax/ops/routing/__init__.py", "from ...sharding import make_mesh", "moe_jax.sharding"),
    ("moe_jax/nn/moe.py", "from moe_jax import training", "moe_jax.training"),
    (
      "moe_jax/nn/moe.py",
      "if TYPE_CHECKING:\n  from moe_jax.training.loop import Run",
      "moe_jax.training.loop",
    ),
    ("moe_jax/training/step.py", "import moe_jax.comparison.arms as arms", "moe_jax.comparison.arms"),
    ("moe_jax/data/corpus.py", "from moe_jax import Config", "moe_jax"),
    ("moe_jax/comparison/report/tables.py", "import jax.numpy as jnp", "jax.numpy"),
    ("moe_jax/comparison/report/tables.py", "from moe_jax.training import step", "moe_jax.training.step"),
    ("moe_jax/training/checkpoint.py", "from tests import reference", "tests"),
    ("experiments/one.py", "import scripts.two", "scripts.two"),
  ],
)
def test_the_guard_fails_on_an_import_against_the_graph(path, source, target):
  (message,) = violations(source, path)
  assert message.startswith(f"{path}:") and message.endswith(f"must not import {target}")


@pytest.mark.parametrize(
  ("path", "source"),
  [
    (
      "moe_jax/ops/routing/topk.py",
      "from .common import a\nfrom ...types import Routing\nimport jax.numpy as jnp",
    ),
    ("moe_jax/nn/moe.py", "from moe_jax.ops import routing\nfrom moe_jax import config, errors\nimport flax"),
    ("moe_jax/comparison/report/html.py", "from moe_jax import __version__\nimport matplotlib"),
    ("experiments/one.py", "from experiments import common\nfrom moe_jax import Config, train_loop"),
  ],
)
def test_the_guard_passes_imports_along_the_graph(path, source):
  assert violations(source, path) == []


def test_a_new_part_needs_a_row():
  (message,) = violations("", "moe_jax/brand_new.py")
  assert "brand_new has no row" in message
