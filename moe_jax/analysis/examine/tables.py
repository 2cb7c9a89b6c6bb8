"""The tables of an examination: a line per layer, and a line per expert with the tokens that it takes."""

import csv
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax import disk
from moe_jax.analysis.examine.examination import Examination

LEAST = 10  # a token is listed only if it occurs so often
NUM_LISTED = 8  # tokens of an expert


def expert_rows(found: Examination, text_of: Callable[[int], str]) -> list[dict[str, Any]]:
  """Returns a line for each expert of each layer.

  `tokens` are those of which the expert takes the largest share, of the tokens that occur at least `LEAST` times.
  `partner` is the expert that most of its tokens are sent to as well, and `partner_share` the share of these tokens.
  `load` and `domain_share` are of assignments: a token may have several of one merged expert.

  Args:
    found: the examination.
    text_of: the text of a token id.
  """
  return [row for layer in range(len(found.layers)) for row in _rows_of_layer(found, layer, text_of)]


def _rows_of_layer(found: Examination, layer: int, text_of: Callable[[int], str]) -> list[dict[str, Any]]:
  sums, load_E = found.layers[layer], found.load_E(layer)
  together_XE, sent_E = sums.together_XE.copy(), np.diagonal(sums.together_XE)
  np.fill_diagonal(together_XE, 0)
  taken_VE = sums.by_token_XE[: len(found.named_ids)]
  share_VE = taken_VE / found.named_counts[:, None] * (found.named_counts >= LEAST)[:, None]
  rows = []
  for expert, load in enumerate(load_E):
    best = [
      v for v in np.argsort(-share_VE[:, expert], kind="stable")[:NUM_LISTED] if share_VE[v, expert] > 0
    ]
    partner = int(together_XE[expert].argmax()) if together_XE[expert].any() else None
    rows.append(
      {
        "layer": layer,
        "expert": expert,
        "load": round(float(load / max(load_E.sum(), 1) * len(load_E)), 4),
        "domain": found.domains[int(sums.by_domain_SE[:, expert].argmax())] if load else "",
        "domain_share": round(float(sums.by_domain_SE[:, expert].max() / load), 4) if load else 0.0,
        "partner": "" if partner is None else partner,
        "partner_share": round(float(together_XE[expert].max() / sent_E[expert]), 4) if load else 0.0,
        "tokens": " ".join(f"{shown(text_of(found.named_ids[v]))}:{share_VE[v, expert]:.0%}" for v in best),
      }
    )
  return rows


def shown(text: str) -> str:
  """Returns a token so that it can be read in a line: spaces and line ends are signs, and others are escaped."""
  signs = {" ": "␣", "\n": "⏎", "\t": "⇥"}
  return "".join(signs.get(c, c if c.isprintable() else repr(c)[1:-1]) for c in text) or "(none)"


def write_csv(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
  """Writes a line per row. A number that there is not, NaN, is an empty cell."""
  with disk.whole_text(path) as file:
    writer = csv.DictWriter(file, rows[0], lineterminator="\n")
    writer.writeheader()
    for row in rows:
      writer.writerow({key: "" if value != value else value for key, value in row.items()})


# Of a layer, what the terminal and the report show: key, title, format.
COLUMNS = (
  ("layer", "Layer", "d"),
  ("num_experts", "Experts", "d"),
  ("experts_per_token", "per token", ".2f"),
  ("max_vio", "MaxVio", ".2f"),
  ("load_entropy", "Load entropy", ".3f"),
  ("dead_experts", "Dead", "d"),
  ("super_experts", "Above 2x", "d"),
  ("router_entropy", "Router entropy", ".2f"),
  ("information_domain", "MI domain", ".3f"),
  ("information_token", "MI token", ".3f"),
  ("information_position", "MI position", ".3f"),
  ("devices_per_token", "Devices", ".2f"),
  ("dropped_at_1", "Drops at 1", ".1%"),
  ("dropped_at_1.25", "at 1.25", ".1%"),
  ("dropped_at_2", "at 2", ".1%"),
)


def cells(row: Mapping[str, Any]) -> list[str]:
  """Returns the cells of a line; "-" for a number that there is not."""
  return ["-" if math.isnan(row[key]) else format(row[key], spec) for key, _, spec in COLUMNS]


def caption(found: Examination) -> str:
  """Says how to read the table of layers."""
  devices = found.num_devices
  return (
    f"{found.num_tokens:,} tokens in {len(found.num_tokens_B):,} windows. MaxVio = max(load) / mean(load) - 1. Load "
    "entropy: of log E. Dead: below 1% of the fair share; above 2x: more than twice of it. Router entropy: of a token's "
    "scores, nats. MI: mutual information between the expert of an assignment and the domain, the token "
    f"({len(found.named_ids)} most frequent ids) or the position, nats. Devices: that a token reaches if the experts lie "
    f"on {devices} devices in order; - where these do not divide the experts. Drops: share of assignments beyond a "
    "capacity factor, if a window were a routing group."
  )
