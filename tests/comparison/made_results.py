"""Results as runs write them, without training."""

import json
import math
from html.parser import HTMLParser

import numpy as np

from moe_jax.comparison import report
from moe_jax.training.results import table_columns

LONG = "switch_loss:0.01:scope=global_batch+z_loss:0.001+loss_free_bias:0.003:rule=sign"


def make_result(arm="none", seed=0, *, num_layers=2, num_experts=4, **validation):
  """A result with every key; `validation` overrides values there."""
  rng = np.random.default_rng(seed)
  load = rng.dirichlet(np.ones(num_experts), num_layers)
  by_domain = rng.dirichlet(np.ones(num_experts), (num_layers, 2))
  layers = [0.5] * num_layers
  return {
    "arm": arm, "seed": seed, "num_steps": 30, "tokens_per_step": 64, "num_params": 1000,
    "num_active_params": 500, "dataset": "stdlib", "fingerprint": "abc123", "domains": ["code", "prose"],
    "entropy_rate": None, "validation_floor": None, "columns": table_columns(),
    "validation": {
      "nll": 2.0, "perplexity": math.exp(2.0), "num_tokens": 640, "max_vio": [1.0, 3.0],
      "dropped_fraction": layers, "dead_experts": [0, 1], "load_entropy": layers, "router_entropy": layers,
      "mutual_information": layers, "load": load.tolist(), "load_by_domain": by_domain.tolist(), **validation,
    },
    "training": {
      "max_vio": layers, "dropped_fraction": layers, "router_entropy": layers, "loss": 2.0,
      "tokens_per_second": 1e4, "seconds": 6.0, "compile_seconds": 2.0, "tail_steps": 6,
    },
    "versions": {"python": "3.11.2", "jax": "0.7.0"}, "device": "cpu x 1",
  }  # fmt: skip


def write_run(folder, all_results, metrics=True):
  """The run folder that a comparison leaves, with config.json."""
  arms = list(dict.fromkeys(r["arm"] for r in all_results))
  for r in all_results:
    seed_folder = folder / "arms" / f"arm_{arms.index(r['arm'])}" / f"seed_{r['seed']}"
    seed_folder.mkdir(parents=True)
    (seed_folder / "result.json").write_text(json.dumps(r))
    if metrics:
      steps = range(10, 40, 10)
      lines = [{"step": s, "loss": 3.0 + r["seed"] - s / 20, "max_vio": [1.0, 2.0 / s]} for s in steps]
      lines.append({"step": 30, "eval_nll": 2.0})
      (seed_folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
  (folder / "config.json").write_text(json.dumps({"arms": arms, "config": {"model": {"num_layers": 2}}}))
  return folder


def write(folder, all_results, **overrides):
  folder.mkdir(parents=True, exist_ok=True)
  words = {"title": "Title", "question": "Which?", "command": "python x.py", "notes": ["A note."]}
  return report.write_report(folder, all_results, **(words | overrides))


class Page(HTMLParser):
  """A page's tables and images; fails where an element is not closed in order."""

  def __init__(self, page):
    super().__init__()
    self.stack, self.names, self.tables, self.images = [], set(), [], []
    self.feed(page)
    assert not self.stack

  def handle_starttag(self, tag, attributes):
    self.names.add(tag)
    if tag not in ("meta", "img", "wbr"):
      self.stack.append(tag)
    if tag == "img":
      self.images.append(dict(attributes))
    elif tag == "table":
      self.tables.append([])
    elif tag == "tr":
      self.tables[-1].append([])
    elif tag in ("td", "th"):
      self.tables[-1][-1].append("")

  def handle_endtag(self, tag):
    assert self.stack.pop() == tag

  def handle_data(self, data):
    if {"td", "th"} & set(self.stack):
      self.tables[-1][-1][-1] += data
