"""Nothing that is read is run: no pickle, no evaluation of text, no shell, no download. docs/security.md says the rest."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"}
NETWORK = {"urllib.request", "requests", "http.client", "httpx", "ftplib", "huggingface_hub", "wget"}
CALLS = {"eval", "exec", "compile", "os.system", "os.popen", "pickle.load", "pickle.loads", "yaml.load"}
UNPICKLES = {"np.load", "numpy.load", "jnp.load", "torch.load"}
# What runs code because that is its purpose: a user's own files, which --plugins names. And what compiles the file of code that
# runs already, to see whether it was edited since; the result is never run.
ALLOWED = {("moe_jax/plugins.py", "exec_module"), ("moe_jax/fingerprint.py", "compile")}
SOURCES = sorted(
  path.relative_to(ROOT).as_posix()
  for folder in ("moe_jax", "experiments", "scripts")
  for path in (ROOT / folder).rglob("*.py")
)


def _name(node: ast.AST) -> str:
  if isinstance(node, ast.Attribute):
    return f"{_name(node.value)}.{node.attr}".lstrip(".")
  return node.id if isinstance(node, ast.Name) else ""


def dangers(source: str, path: str) -> list[str]:
  """One line for each import or call that could run or fetch what it is given."""
  found = []
  for node in ast.walk(ast.parse(source, path)):
    words = ""
    if isinstance(node, ast.Import | ast.ImportFrom):
      names = [alias.name for alias in node.names]
      names += (
        [node.module or ""] + [f"{node.module}.{name}" for name in names]
        if isinstance(node, ast.ImportFrom)
        else []
      )
      words = next(
        (n for n in names if n.split(".")[0] in MODULES or n in NETWORK or n.split(".")[0] in NETWORK), ""
      )
    elif isinstance(node, ast.Call):
      name = _name(node.func)
      given = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
      plain = isinstance(node.func, ast.Name) or "." in name  # not the method of what another call returns
      if (plain and name in CALLS) or name.endswith(".exec_module"):
        words = name.removeprefix("spec.loader.")
      elif name in UNPICKLES and given.get("allow_pickle", False) is not False:
        words = f"{name}(allow_pickle)"
      elif name == "torch.load" and given.get("weights_only") is not True:
        words = name
      elif given.get("shell"):
        words = f"{name}(shell=True)"
    if words and (path, words) not in ALLOWED:
      found.append(f"{path}:{node.lineno}: {words}")
  return found


def test_the_tree_has_no_dangers():
  found = [line for path in SOURCES for line in dangers((ROOT / path).read_text(), path)]
  assert not found, "\n".join(found)


@pytest.mark.parametrize(
  "source",
  [
    "import pickle",
    "from yaml import load",
    "from urllib import request",
    "import urllib.request as r",
    "eval('1')",
    "exec(text)",
    "import os\nos.system('ls')",
    "np.load(path, allow_pickle=True)",
    "torch.load(path)",
    "subprocess.run('ls', shell=True)",
    "spec.loader.exec_module(module)",
  ],
)
def test_the_guard_finds_them(source):
  assert len(dangers(source, "moe_jax/x.py")) == 1


def test_the_guard_passes_what_is_safe():
  source = "import json\nnp.load(path, allow_pickle=False)\nre.compile('a')\njax.jit(f).lower(x).compile()\nrun(['ls'])"
  assert dangers(source, "moe_jax/x.py") == []
