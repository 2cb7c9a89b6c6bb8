"""Writes the tables of README.md and docs/*.md from the results that are stored in docs/results/.

  python scripts/render_tables.py                                                # rewrites every table
  python scripts/render_tables.py --check                                        # only says which pages differ
  python scripts/render_tables.py --add=balancing --run_dir=runs/load_balancing  # stores the results of a run

A page has a table between these lines. Without `columns=`, the table has all columns. `KEY:verdict` is the difference
from the first arm with its verdict.

  <!-- table balancing columns=bits_per_byte,bits_per_byte:verdict,max_vio -->
  <!-- end -->

Between `<!-- findings -->` and the end, a page has the claims of docs/findings.toml, tested on stored tables.

docs/results/NAME/ holds summary.csv, differences.csv and about.json, at full precision; of a sweep also sweep.csv.
"""

import pathlib
import re
import shutil
import sys

from absl import flags

from moe_jax import cli, disk
from moe_jax.errors import InputError

_ADD = flags.DEFINE_string("add", None, "store the results of --run_dir in docs/results/ under this name")
_RUN_DIR = flags.DEFINE_string("run_dir", None, "with --add: the folder of a finished comparison")
_CHECK = flags.DEFINE_bool("check", False, "write nothing; exit with status 1 if a page would change")

ROOT = pathlib.Path(__file__).resolve().parents[1]
_BEGIN = re.compile(
  r"^<!-- (?:findings|table (?P<name>[\w.-]+)(?: columns=(?P<columns>\S+))?) -->\n", re.MULTILINE
)
_END = "<!-- end -->"


def add(root: pathlib.Path, name: str, run_dir: pathlib.Path) -> pathlib.Path:
  """Copies the files of a run's table to docs/results/NAME and returns that folder.

  Raises:
    InputError: if the name is not a plain word, or the run has no table.
  """
  from moe_jax.comparison import report

  if not re.fullmatch(r"[\w-][\w.-]*", name):
    raise InputError(f"--add={name}: use letters, digits, '_', '-' and '.'")
  report.read_stored(run_dir)
  folder = root / "docs" / "results" / name
  folder.mkdir(parents=True, exist_ok=True)
  for file in report.FILES:
    shutil.copyfile(run_dir / file, folder / file)
  (folder / report.TRIED).unlink(missing_ok=True)
  if (run_dir / report.TRIED).is_file():
    shutil.copyfile(run_dir / report.TRIED, folder / report.TRIED)
  return folder


def rendered(page: pathlib.Path, results: pathlib.Path) -> str:
  """Returns the text of a page with each table as the files in `results` render it.

  Raises:
    InputError: if a table has no end, no files, or no such column.
  """
  text = page.read_text(encoding="utf-8")
  done, at = [], 0
  for begin in _BEGIN.finditer(text):
    end, following = text.find(_END, begin.end()), _BEGIN.search(text, begin.end())
    if end < 0 or (following and following.start() < end):
      raise InputError(f"{page}: {_what(begin)} has no line {_END}")
    try:
      table = _table(begin, results)
    except InputError as error:
      raise InputError(f"{page}: {_what(begin)}: {error}") from None
    done += [text[at : begin.end()], "\n", table, "\n"]
    at = end
  return "".join([*done, text[at:]])


def _what(begin: re.Match) -> str:
  return f"table {begin['name']}" if begin["name"] else "findings"


def _table(begin: re.Match, results: pathlib.Path) -> str:
  from moe_jax.comparison import findings, report

  if begin["name"]:
    columns = begin["columns"].split(",") if begin["columns"] else ()
    return report.markdown_table(report.read_stored(results / begin["name"]), columns)
  claims = findings.read_findings(results.parent / "findings.toml")
  tables = {name: report.read_stored(results / name) for name in {claim.table for claim in claims}}
  return findings.markdown(claims, tables)


def stale_pages(root: pathlib.Path) -> dict[pathlib.Path, str]:
  """Returns page -> its new text, for README.md and docs/*.md whose tables are not those of docs/results/."""
  pages = [path for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))) if path.exists()]
  new = {page: rendered(page, root / "docs" / "results") for page in pages}
  return {page: text for page, text in new.items() if text != page.read_text(encoding="utf-8")}


def main(argv: list[str]) -> None:
  del argv
  if (_ADD.value is None) != (_RUN_DIR.value is None):
    raise InputError("--add and --run_dir need each other")
  if _ADD.value is not None:
    print(f"wrote {add(ROOT, _ADD.value, pathlib.Path(_RUN_DIR.value))}")
    return
  stale = stale_pages(ROOT)
  for page, text in stale.items():
    if not _CHECK.value:
      disk.write_text(page, text)
    print(f"{page.relative_to(ROOT)}: {'differs' if _CHECK.value else 'rewritten'}")
  sys.exit(1 if stale and _CHECK.value else 0)


if __name__ == "__main__":
  cli.run(main)
