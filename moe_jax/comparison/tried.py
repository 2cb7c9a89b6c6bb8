"""What a sweep tried: sweep.csv, and in words."""

import csv
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from moe_jax import disk

TRIED = "sweep.csv"  # in the folder of a comparison
COLUMNS = ("arm", "value", "seeds", "num_steps", "nll", "max_vio", "goal", "chosen", "note")


def tried_in_words(lines: Sequence[Mapping[str, Any]]) -> list[str]:
  """Returns a sentence for each arm of sweep.csv, for the notes of a report.

  Args:
    lines: as from `Sweep.choose` or `read_tried`. Those of before do not say their steps.
  """
  arms: dict[str, list[Mapping[str, Any]]] = {}
  for line in lines:
    arms.setdefault(line["arm"], []).append(line)
  sentences = []
  for arm, of_arm in arms.items():
    first = of_arm[0]
    if not first["value"]:
      sentences.append(f"{arm} has none of the options of the sweep, and is trained as it is.")
      continue
    seeds = first["seeds"].replace(" ", ", ")
    steps = {str(line.get("num_steps") or "") for line in of_arm}
    after = f", after {steps.pop()} steps" if len(steps) == 1 and "" not in steps else ""
    text = f"{arm}: chosen by {first['goal']} on the selection seeds {seeds}{after}. Tried: "
    text += "; ".join(_line_in_words(line) for line in of_arm)
    sentences.append(text + ".")
  return sentences


def write_tried(path: pathlib.Path, lines: Sequence[Mapping[str, Any]]) -> None:
  """Writes sweep.csv: a line per arm and value. Lines of other arms stay, which other shards may have written."""
  arms = {line["arm"] for line in lines}
  others = read_tried(path) if path.exists() else []
  lines = [line for line in others if line["arm"] not in arms] + list(lines)
  with disk.whole_text(path) as file:
    writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: "" if x != x else x for k, x in line.items()} for line in lines)  # no text for NaN


def read_tried(path: pathlib.Path) -> list[dict[str, str]]:
  """Returns the lines of a sweep.csv, all values as text, without those that are not whole."""
  with path.open(encoding="utf-8", errors="replace", newline="") as file:
    return [line for line in csv.DictReader(file) if _is_whole(line)]


def _is_whole(line: Mapping[str, str | None]) -> bool:
  if any(line.get(name) is None for name in COLUMNS if name != "num_steps"):  # which older ones lack
    return False
  try:
    for name in ("nll", "max_vio"):
      float(line[name] or "nan")
  except ValueError:
    return False
  return True


def _line_in_words(line: Mapping[str, Any]) -> str:
  chosen = ", chosen" if str(line["chosen"]) == "True" else ""
  note = f" ({line['note']})" if line["note"] else ""
  nll, max_vio = (float("nan" if line[name] == "" else line[name]) for name in ("nll", "max_vio"))
  return f"{line['value']} (nll {nll:.4f}, MaxVio {max_vio:.3f}{chosen}){note}"
