"""Reads the running interpreter's standard library as a corpus that every machine has, in five domains.

  code     modules outside the tests, without docstrings, with comments
  prose    those docstrings (one document per module), the language reference in `pydoc_data/topics.py`
           (one document per topic) and the README, NEWS and CREDITS files
  tables   `encodings/*.py` from the decoding table on, and `html/entities.py`
  tests    unit tests
  numbers  decimal and complex arithmetic cases, `*.decTest` and `*math_testcases.txt`, without comments

Debian does not ship the `test` package, so the last two domains are missing or small there. A domain of less than
`MIN_DOMAIN_BYTES` is left out. The code pages in `tables` resemble each other, so the validation documents of this
domain are much easier than new text. Keep this in mind when you compare domains.

The sha256 of a text's path decides whether it is included, never the order of a directory listing. Each domain is
filled to `DOMAIN_BYTES`, so that no domain dominates the others and a build takes seconds.
"""

import ast
import hashlib
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

DOMAINS = ("code", "prose", "tables", "tests", "numbers")
DOMAIN_BYTES = 1_500_000  # a domain is filled up to this many bytes of utf-8
MIN_DOMAIN_BYTES = 64_000  # a domain with less is left out
FILE_BYTES = 12_000  # longer texts are truncated, so that no file dominates a domain
DOCUMENT_BYTES = 16_000  # shorter texts are joined up to this size, which makes padding negligible
# Share of the bytes of every domain, in whole files: about 280 kB in total, so that evaluation takes seconds.
VALIDATION_FRACTION = 0.04

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "lib-dynload"}
_TEST_FOLDERS = {"test", "tests", "idle_test"}


class Document(NamedTuple):
  text: str
  domain: str
  split: str  # train | validation


def stdlib_root() -> Path:
  return Path(sysconfig.get_paths()["stdlib"])


def list_files(root: Path) -> list[tuple[str, int]]:
  """(path relative to `root`, size in bytes) of every candidate file, ordered by the hash of the path."""
  found = []
  for folder, subfolders, names in os.walk(root):
    # config-3.x and _sysconfigdata contain paths of the build machine. They are not text and differ everywhere.
    subfolders[:] = [s for s in subfolders if s not in _SKIPPED_FOLDERS and not s.startswith("config-")]
    for name in names:
      path = Path(folder, name)
      if path.suffix not in (".py", ".txt", ".rst", ".decTest") or name.startswith("_sysconfigdata"):
        continue
      if not path.is_symlink():  # Debian links sitecustomize.py to /etc
        found.append((path.relative_to(root).as_posix(), path.stat().st_size))
  return sorted(found, key=lambda item: _hash(item[0]))


def read_documents(
  root: Path, *, domain_bytes: int = DOMAIN_BYTES, min_bytes: int = MIN_DOMAIN_BYTES
) -> list[Document]:
  """Returns the corpus, in a fixed pseudo-random order of documents within each domain and split.

  A text belongs entirely to one split. The first texts of a domain, in hash order, fill the validation split to
  `VALIDATION_FRACTION` of the domain, so both splits are random samples of the same files.
  """
  texts: dict[str, list[str]] = {domain: [] for domain in DOMAINS}
  filled = dict.fromkeys(DOMAINS, 0)
  for path, _ in list_files(root):
    for domain, text in _texts_of(root, path, wanted={d for d in DOMAINS if filled[d] < domain_bytes}):
      text = _beginning(text.encode(errors="replace").decode())  # a docstring may contain a lone surrogate
      if text.strip() and filled[domain] < domain_bytes:
        texts[domain].append(text)
        filled[domain] += len(text.encode())
  documents = []
  for domain in DOMAINS:
    if filled[domain] < min_bytes:
      continue
    validation, train = _split(texts[domain], VALIDATION_FRACTION * filled[domain])
    documents += [Document(t, domain, "train") for t in _join_short(train)]
    documents += [Document(t, domain, "validation") for t in _join_short(validation)]
  return documents


def _hash(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()


def _texts_of(root: Path, path: str, wanted: set[str]) -> Iterator[tuple[str, str]]:
  """Yields (domain, text) of one file. Skips work for domains that are not `wanted`."""
  parts = path.split("/")
  name = parts[-1]
  in_tests = bool(_TEST_FOLDERS & set(parts[:-1])) or name.startswith("test_")

  def read() -> str:
    return (root / path).read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n")

  if name.endswith(".decTest") or name.endswith("math_testcases.txt"):
    if "numbers" in wanted:
      yield "numbers", re.sub(r"(?m)^(--.*)?\n", "", read())
  elif in_tests:
    if name.endswith(".py") and "tests" in wanted:
      yield "tests", read()
  elif not name.endswith(".py"):
    if "prose" in wanted:
      yield "prose", read()
  elif path == "pydoc_data/topics.py":
    if "prose" in wanted:
      topics = re.search(r"topics = (\{.*\})", read(), re.DOTALL)
      by_name = ast.literal_eval(topics[1]) if topics else {}
      yield from (("prose", by_name[topic]) for topic in sorted(by_name))
  elif parts[0] == "encodings" or path == "html/entities.py":
    table = re.search(r"(?ms)^(decoding_\w+|name2codepoint) = .*", read())
    if table and "tables" in wanted:
      yield "tables", table[0]
  elif wanted & {"code", "prose"}:
    code, docstrings = split_docstrings(read())
    yield "code", code
    yield "prose", "\n\n".join(docstrings)


def split_docstrings(source: str) -> tuple[str, list[str]]:
  """Returns a module's source without its docstrings, and the docstrings in order.

  If the module cannot be parsed, returns all of it as source.
  """
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # invalid escapes in old modules
      body = ast.parse(source).body
  except (SyntaxError, ValueError):
    return source, []
  docstrings: list[ast.Expr] = []

  def visit(body: list[ast.stmt]) -> None:
    for i, node in enumerate(body):
      if i == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        if isinstance(node.value.value, str):
          docstrings.append(node)
      elif isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        visit(node.body)

  visit(body)
  lines = source.splitlines(keepends=True)
  for node in docstrings:
    for i in range(node.lineno - 1, node.end_lineno):
      lines[i] = ""
  return "".join(lines), [_dedent(node.value.value) for node in docstrings]


def _dedent(docstring: str) -> str:
  return "\n".join(line.strip() if i == 0 else line for i, line in enumerate(docstring.splitlines())).strip()


def _beginning(text: str) -> str:
  """Returns at most `FILE_BYTES` characters, cut at the end of a line."""
  if len(text) <= FILE_BYTES:
    return text
  return text[: text.rfind("\n", 0, FILE_BYTES) + 1] or text[:FILE_BYTES]


def _split(texts: list[str], validation_bytes: float) -> tuple[list[str], list[str]]:
  """Splits off the first texts, at least one, that together have `validation_bytes`."""
  held = 0
  for i, text in enumerate(texts):
    held += len(text.encode())
    if held >= validation_bytes:
      return texts[: i + 1], texts[i + 1 :]
  return texts, []


def _join_short(texts: list[str]) -> list[str]:
  """Joins consecutive texts with an empty line until each document has `DOCUMENT_BYTES` characters."""
  documents, part = [], ""
  for text in texts:
    part = f"{part}\n\n{text}" if part else text
    if len(part) >= DOCUMENT_BYTES:
      documents.append(part)
      part = ""
  return documents + [part] * bool(part)
