"""The code that CONTRIBUTING.md quotes is the code of the file that its first line names."""

import pathlib
import re

import pytest

from tests.test_adding_a_method import KINDS

ROOT = pathlib.Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


def quotes(markdown: str) -> list[tuple[str, str]]:
  """(path, code) of every python block. Each begins with a comment that names its file."""
  blocks = re.findall(r"^```python\n(.*?)^```", markdown, re.DOTALL | re.MULTILINE)
  return [re.fullmatch(r"# (\S+\.\w+)\n(.*)", block, re.DOTALL).groups() for block in blocks]


def without_blank_lines(text: str) -> str:
  return "\n".join(["", *(line for line in text.splitlines() if line.strip()), ""])


def missing(quoted: list[tuple[str, str]]) -> list[str]:
  """Definitions that are not in their file, whole lines each. Two blank lines separate definitions, which may lie apart."""
  parts = [(path, part.strip("\n")) for path, code in quoted for part in code.split("\n\n\n")]
  files = {path: without_blank_lines((ROOT / path).read_text()) for path, _ in quoted}
  return [f"{path}: {part}" for path, part in parts if without_blank_lines(part) not in files[path]]


def test_quoted_code_is_that_of_the_files():
  assert missing(quotes(TEXT)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_names_the_registry_of_each_kind(kind):
  assert f"`moe_jax/{KINDS[kind].registry}`" in TEXT


def test_another_definition_is_found_missing():
  assert missing([("moe_jax/errors.py", "import difflib\n\n\nimport nothing\n")]) == [
    "moe_jax/errors.py: import nothing"
  ]
