"""The digest of a user's code: another one whenever the code is, also where a file is edited while a process has it."""

import importlib.util
import os
import time

import pytest

from moe_jax import fingerprint


def imported(path):
  spec = importlib.util.spec_from_file_location("a_plugin", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.parametrize("code", [
  "import jax\n@jax.jit\ndef h(x):\n  return x * {0}\ndef f(x):\n  return h(x)",
  "import functools\n@functools.lru_cache\ndef h(x):\n  return x * {0}\ndef f(x):\n  return h(x)",
  "import jax\ndef h(x):\n  return x * {0}\ng = jax.vmap(h)\ndef f(x):\n  return g(x)",
  "import functools\ndef h(x, k):\n  return x * k\ng = functools.partial(h, k={0})\ndef f(x):\n  return g(x)",
  "def own(h):\n  import functools\n  return functools.wraps(h)(lambda x: {0} * h(x))\n@own\ndef h(x):\n  return x\ndef f(x):\n  return h(x)",
  "S = {0}.0\ndef f(x, s=S):\n  return x * s",
  "S = {0}.0\ndef f(x, *, s=S):\n  return x * s",
  "S = [{0}.0]\ndef f(x):\n  return x * S[0]",
  "S = {{'a': {0}}}\ndef f(x):\n  return x * S['a']",
  "import numpy as np\nS = np.full(2000, 1.0)\nS[1000] = {0}\ndef f(x):\n  return x * S",
  "class f:\n  s = (1, {0})\n  def __call__(self, x):\n    return x * self.s[1]",
  "import functools, jax\nclass f:\n  @functools.partial(jax.jit, static_argnums=0)\n  def g(self, x):\n    return x * {0}",
  "import functools\nclass f:\n  @functools.cached_property\n  def g(self):\n    return {0}",
  "f = (lambda x: x +\n  {0})",
  "f = (lambda x:\n  {0})",
  "f = max([lambda x: x, lambda x: (x\n  - {0})], key=id)",
  "def h(x):\n  return x * {0}\nS = {{'h': h}}\ndef f(x):\n  return S['h'](x)",
  "def h(x):\n  return x * {0}\nS = [(h, max)]\ndef f(x):\n  return S[0][0](x)",
  "class H:\n  def __call__(self, x):\n    return x * {0}\nS = H()\ndef f(x):\n  return S(x)",
  "class H:\n  def g(self, x):\n    return x * {0}\nS = H().g\ndef f(x):\n  return S(x)",
  "class H:\n  def __init__(self):\n    self.n = {0}\nS = H()\ndef f(x):\n  return x * S.n",
  "import dataclasses\n@dataclasses.dataclass\nclass H:\n  n: int\nS = H({0})\ndef f(x):\n  return x * S.n",
  "import types\nS = types.SimpleNamespace(n={0})\ndef f(x):\n  return x * S.n",
  "import enum\nclass H(enum.Enum):\n  N = {0}\ndef f(x):\n  return x * H.N.value",
  "def h(x):\n  return x * {0}\nclass f:\n  S = {{'h': h}}\n  def g(self, x):\n    return self.S['h'](x)",
  "S = {0}j\ndef f(x):\n  return x * S",
  "S = frozenset({{'a', {0}}})\ndef f(x):\n  return x in S",
  "S = range({0})\ndef f(x):\n  return x in S",
])  # fmt: skip
def test_the_digest_sees_through_decorators_and_into_constants(tmp_path, code):
  def digest_with(number):
    path = tmp_path / f"{number}.py"
    path.write_text(code.format(number))
    return fingerprint.digest(imported(path).f)

  assert digest_with(2) == digest_with(2) != digest_with(3)


HELPER = (
  "def h(x):\n  return x * {0}\nclass f:\n  def g(self, x):\n    return (lambda y: h(y)\n      + {0})(x)\n"
)


def write(path, number, seconds):
  """Writes the file as if `seconds` from now. Python takes a compiled file for the same if size and time are."""
  path.write_text(HELPER.format(number))
  os.utime(path, (time.time() + seconds,) * 2)


@pytest.mark.parametrize("first", [10.0, -1e6], ids=["new", "old"])
def test_a_file_that_is_edited_and_imported_again_is_other_code(tmp_path, first):
  """As `importlib.reload` and `%autoreload` do it in a notebook."""
  path, found = tmp_path / "edited.py", []
  for number, seconds in ((2, first), (3, 20.0), (2, 30.0)):
    write(path, number, seconds)
    found.append(fingerprint.digest(imported(path).f))
  assert found[0] == found[2] != found[1]


def test_a_file_that_is_edited_after_it_was_imported_is_not_what_runs(tmp_path):
  path = tmp_path / "edited.py"
  write(path, 2, -1e6)
  old = imported(path).f
  before = fingerprint.digest(old)
  write(path, 3, 10.0)
  stale, new = fingerprint.digest(old), fingerprint.digest(imported(path).f)
  assert len({before, stale, new}) == 3  # refused rather than stored under what did not run
  path.write_text("def f(:")
  assert fingerprint.digest(old) == stale
