"""Rules for the files of the repository: size, links, notebooks, and forbidden words."""

import ast
import json
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDERS = ("moe_jax", "experiments", "scripts", "tests", "notebooks", "docs", ".ci", ".github")
MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 80


def _files(*suffixes: str) -> list[str]:
  """The project's own text files, relative to the root; environments, runs and caches are not looked at."""
  found = [path for path in ROOT.iterdir() if path.is_file()]
  for folder in FOLDERS:
    found += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
  hidden = ("__pycache__", ".ipynb_checkpoints")
  return sorted(
    path.relative_to(ROOT).as_posix()
    for path in found
    if not any(part in hidden for part in path.parts) and (not suffixes or path.suffix in suffixes)
  )


def _long_parts(source: str, path: str) -> list[str]:
  lines = len(source.splitlines())
  found = [f"{path}: {lines} lines, at most {MAX_FILE_LINES}"] if lines > MAX_FILE_LINES else []
  for node in ast.walk(ast.parse(source, path)):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      lines = node.end_lineno - node.lineno + 1
      if lines > MAX_FUNCTION_LINES:
        found.append(f"{path}:{node.lineno}: {node.name} has {lines} lines, at most {MAX_FUNCTION_LINES}")
  return found


def test_files_and_functions_are_short():
  sources = [path for path in _files(".py") if path.startswith(("moe_jax/", "experiments/", "scripts/"))]
  found = [long for path in sources for long in _long_parts((ROOT / path).read_text(), path)]
  assert not found, "\n".join(found)


def test_the_size_guard_finds_long_files_and_functions():
  function = "def f():\n" + "  x = 1\n" * MAX_FUNCTION_LINES
  assert _long_parts(function, "a.py") == ["a.py:1: f has 81 lines, at most 80"]
  assert _long_parts("x = 1\n" * (MAX_FILE_LINES + 1), "a.py") == ["a.py: 351 lines, at most 350"]


def test_files_are_written_in_one_rename():
  """By `moe_jax.disk`, so that a file that exists is whole. Soaks spoil files, and may not."""
  found = [
    path
    for path in _files(".py")
    if path.startswith(("moe_jax/", "experiments/", "scripts/")) and not path.startswith("scripts/soak")
    for match in re.finditer(r"(\w+)\)?\.write_(text|bytes)\(", (ROOT / path).read_text())
    if match[1] != "disk"
  ]
  assert not found, found


def test_every_folder_of_the_package_is_a_package():
  folders = {path.parent for path in (ROOT / "moe_jax").rglob("*.py")}
  missing = [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").exists()]
  assert not missing, f"without __init__.py, so setup.py leaves them out: {sorted(missing)}"


def _without_code(markdown: str) -> str:
  return re.sub(r"```.*?```|`[^`\n]*`", "", markdown, flags=re.DOTALL)


def _broken_links(markdown: str, folder: pathlib.Path) -> list[str]:
  """Relative link targets that do not exist, and anchors that no heading of the target has."""
  broken = []
  for target in re.findall(r"\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)", _without_code(markdown)):
    if re.match(r"[a-z][a-z0-9+.-]*:", target):  # http:, mailto:
      continue
    name, _, anchor = target.partition("#")
    path = folder / name
    if name and not path.exists():
      broken.append(target)
    elif anchor and (not name or path.suffix == ".md"):
      text = path.read_text() if name else markdown
      headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
      slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
      if anchor not in slugs:
        broken.append(target)
  return broken


@pytest.mark.parametrize("path", _files(".md"))
def test_relative_links_lead_somewhere(path):
  assert _broken_links((ROOT / path).read_text(), (ROOT / path).parent) == []


def test_the_link_guard_finds_broken_links(tmp_path):
  (tmp_path / "a.md").write_text("# One, two\n")
  text = (
    "[x](a.md#one-two) [y](b.md) [z](a.md#three) [w](#here) [v](https://x.org/b.md) `[u](c.md)`\n# Here\n"
  )
  assert _broken_links(text, tmp_path) == ["b.md", "a.md#three"]


def _tree_entries(markdown: str) -> list[str]:
  """Paths in fenced file trees (the fences that have a line starting with moe_jax/), by indentation.

  A line is an entry, or several next to each other, then two spaces or more and what it is.
  """
  entries = []
  for fence in re.findall(r"^```[^\n]*\n(.*?)^```", markdown, re.DOTALL | re.MULTILINE):
    lines = [re.sub("[│├└─]", " ", line) for line in fence.splitlines()]
    if not any(re.match(r"\s*moe_jax/(\s|$)", line) for line in lines):
      continue
    parents: list[tuple[int, str]] = []
    for line in lines:
      indent = len(line) - len(line.lstrip())
      parents = [(column, name) for column, name in parents if column < indent]
      for word in line.split():
        if not re.fullmatch(r"[\w.-]+(/|\.\w+|[\w/.-]*/)|[A-Z]{6,}|\.\w[\w./-]*", word):
          break
        entries.append("".join(name for _, name in parents) + word)
        if word.endswith("/"):
          parents.append((indent, word))
          break
  return entries


def test_the_file_tree_of_the_readme_exists():
  missing = [
    entry for entry in _tree_entries((ROOT / "README.md").read_text()) if not (ROOT / entry).exists()
  ]
  assert not missing, f"README.md's file tree names what is not there: {missing}"


def test_the_tree_guard_reads_trees():
  tree = "```\nREADME.md  LICENSE  setup.py\nmoe_jax/  the package\n  types.py   e.g. x.py\n  ops/\n    a.py\ntests/\n```\n"
  expected = ["README.md", "LICENSE", "setup.py", "moe_jax/", "moe_jax/types.py", "moe_jax/ops/"]
  assert _tree_entries(tree) == [*expected, "moe_jax/ops/a.py", "tests/"]
  drawn = "```\nmoe_jax/\n├── types.py  axis legend\n└── ops/\n    └── a.py\n```\n"
  assert _tree_entries(drawn) == ["moe_jax/", "moe_jax/types.py", "moe_jax/ops/", "moe_jax/ops/a.py"]


def test_no_file_names_a_path_of_the_machine_it_was_written_on():
  forbidden = ["../" + "shared", "/wo" + "rk/", "/ro" + "ot/", "/tmp/" + "v/"]
  suffixes = (".py", ".md", ".sh", ".toml", ".yaml", ".yml", ".ipynb", ".json", ".csv", ".html", "")
  found = [
    f"{path}: {word}"
    for path in _files(*suffixes)
    for word in forbidden
    if word in (ROOT / path).read_text(errors="replace")
  ]
  assert not found, "\n".join(found)


@pytest.mark.parametrize("path", _files(".ipynb"))
def test_notebooks_are_stored_without_outputs(path):
  cells = json.loads((ROOT / path).read_text())["cells"]
  stored = [i for i, cell in enumerate(cells) if cell.get("outputs") or cell.get("execution_count")]
  assert not stored, f"{path}: clear the outputs of cells {stored}"


def test_badges_and_notebooks_name_the_repository_of_setup():
  url = re.search(
    r'^REPOSITORY = "(https://github.com/[\w.-]+/[\w.-]+)"$', (ROOT / "setup.py").read_text(), re.M
  )[1]
  colab = url.replace("https://github.com/", "https://colab.research.google.com/github/") + "/blob/main/"
  notebooks = _files(".ipynb")
  for path in ("README.md", *notebooks):
    text = (ROOT / path).read_text()
    found = re.findall(r"https://colab\.research\.google\.com/github/[^)\s\"\\]+", text)
    assert set(found) == {colab + notebook for notebook in (notebooks if path == "README.md" else [path])}, (
      path
    )
    if path != "README.md":
      assert f'REPOSITORY = \\"{url}\\"\\n' in text, f"{path}: its first cell must install from {url}"


def test_ruff_is_the_same_version_everywhere():
  pins = set()
  for path in ("setup.py", ".pre-commit-config.yaml"):
    pins |= set(re.findall(r"ruff==[\w.*]+", (ROOT / path).read_text()))
  assert len(pins) == 1, pins


def test_every_file_beside_the_code_is_installed():
  """An installation that is not editable has only what setup.py names."""
  named = set(re.findall(r'"(moe_jax[\w.]*)": \["templates/\*"\]', (ROOT / "setup.py").read_text()))
  others = {
    path for path in (ROOT / "moe_jax").rglob("*") if path.is_file() and "__pycache__" not in path.parts
  }
  others = {path.relative_to(ROOT).parent for path in others if path.suffix != ".py"}
  assert {path.name for path in others} == {"templates"}
  assert {path.parent.as_posix().replace("/", ".") for path in others} == named
