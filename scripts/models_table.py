"""Writes the tables of docs/models.md: what the published models have, counted from their configurations, and the
differences from transformers that `python -m tests.parity.table` has stored in docs/results/parity.json.

  python scripts/models_table.py          # rewrites the tables
  python scripts/models_table.py --check  # only says whether the page differs, with status 1 if so

A table stands between a line `<!-- models: NAME -->`, where NAME is sizes, experts or costs, and `<!-- end -->`.
"""

import functools
import json
import pathlib
import re
import sys
from typing import Any

from absl import flags

from moe_jax import cli
from moe_jax.errors import InputError
from moe_jax.models import PUBLISHED

PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "models.md"
PARITY = PAGE.parent / "results" / "parity.json"
_TABLE = re.compile(r"(<!-- models: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
GIB = 2**30


def _sizes(found) -> dict[str, str]:
  says, active = PUBLISHED[found.name], found.active
  billions = lambda x: f"{x / 1e9:.2f}"
  return {
    "parameters": f"{found.parameters.total:,}",
    "published": says.total,
    "active, 10^9: all": billions(active.all),
    "with head": billions(active.head),
    "without": billions(active.none),
    "published active": says.active or "-",
    "parity: logits": parity(found.name, "logits"),
    "gradients": parity(found.name, "gradients"),
    "source": _link(says.source),
  }


def parity(name: str, what: str) -> str:
  """The figure of the tiny model that stands for a published one; "-" if no checkpoint of it is known."""
  return next((f"{row[what]:.1e}" for row in _stored_parity() if name in row["presets"]), "-")


@functools.cache
def _stored_parity() -> list[dict[str, Any]]:
  return list(json.loads(PARITY.read_text()).values())


def _experts(found) -> dict[str, str]:
  (row,) = found.routed
  parts = found.parameters
  return {
    "layers with experts": f"{row.layers}",
    "E": f"{row.num_experts}",
    "K": f"{row.num_experts_per_token}",
    "E / K": f"{row.sparsity:.4g}",
    "combinations": f"{row.combinations:.3g}",
    "routed experts, share of all": f"{parts.experts / parts.total:.1%}",
    "attention": f"{parts.attention / parts.total:.1%}",
    "embedding and head": f"{(parts.embedding + parts.head) / parts.total:.1%}",
  }


def _costs(found) -> dict[str, str]:
  billions, gib = (lambda x: f"{x / 1e9:,.1f}"), (lambda x: f"{x / GIB:,.1f}")
  return {
    "GFLOPs: prefill": billions(found.forward.forward),
    "decoding": billions(found.decoding_flops),
    "training": billions(found.training_flops),
    "GiB: bfloat16": gib(found.weight_bytes["bfloat16"]),
    "FP8": gib(found.weight_bytes["fp8"]),
    "int4": gib(found.weight_bytes["int4"]),
    "AdamW": gib(found.optimizer_bytes["adamw"]),
    "cache, KiB per token": f"{found.cache.per_token / 1024:,.4g}",
    "and MiB per sequence": f"{found.cache.fixed / 2**20:,.4g}",
  }


_ROWS = {"sizes": _sizes, "experts": _experts, "costs": _costs}


def _link(source: str) -> str:
  number = re.match(r"\d{4}\.\d{5}", source)
  return f"[{source}](https://arxiv.org/abs/{number[0]})" if number else source


def table(name: str, accounts: list) -> str:
  """Returns the Markdown table of that name, with a row for each account."""
  if name not in _ROWS:
    raise InputError(f"{PAGE.name}: no table {name!r}; known: {', '.join(_ROWS)}")
  rows = [{"model": f"`{found.name}`"} | _ROWS[name](found) for found in accounts]
  lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
  return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def rendered(text: str, accounts: list) -> str:
  """Returns the page with its tables as the accounts give them."""
  return _TABLE.sub(lambda found: f"{found[1]}\n{table(found[2], accounts)}\n{found[3]}", text)


def main(argv: list[str]) -> None:
  del argv
  import moe_jax

  text = PAGE.read_text(encoding="utf-8")
  new = rendered(text, [moe_jax.account(name) for name in PUBLISHED])
  if new != text:
    if not flags.FLAGS.check:
      PAGE.write_text(new, encoding="utf-8")
    print(f"{PAGE.name}: {'differs' if flags.FLAGS.check else 'rewritten'}")
  sys.exit(1 if new != text and flags.FLAGS.check else 0)


if __name__ == "__main__":
  flags.DEFINE_bool("check", False, "write nothing; exit with status 1 if the page would change")
  cli.run(main)
