"""What the caption of a table says about its runs: model, length, size, speed, hardware."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from moe_jax.comparison.results import Result, diverged, lookup


def facts_of(results: Sequence[Result]) -> dict[str, Any]:
  """Returns what the results say about their runs, as JSON values. A fact that no result has is left out.

  Each fact is a list of its different values, sorted; `tokens_per_second` is one number, the median over runs, `slots` are
  those of the first arm, with which the others are compared, and `diverged` has [arm, seed, reason] of each run that did.
  `not_chosen` has the arms in whose place a sweep has chosen others since. `tokens` and `tokens_per_second` count padding, of
  which `padded` is the part; `bytes` do not, where that part is known.
  """
  known = {
    "dataset": _different(r.get("dataset") for r in results),
    "num_steps": _different(r.get("num_steps") for r in results),
    "tokens": _different(_tokens(r) for r in results),
    "bytes": _different(_bytes(r) for r in results),
    "padded": _padded(results),
    "num_params": _different(r.get("num_params") for r in results),
    "num_active_params": _different(r.get("num_active_params") for r in results),
    "learning_rate": _different(lookup(r, "schedule", "learning_rate") for r in results),
    "slots": _different(r.get("slots") for r in results if r["arm"] == results[0]["arm"]),
    "hardware": _different(_hardware(r) for r in results),
    "seeds": _different(r["seed"] for r in results),
    "swept": _different(_swept(r) for r in results),
    "not_chosen": _different(str(r["arm"]) for r in results if lookup(r, "swept", "chosen") is False),
    "eval_batches": _different(_eval_batches(r) for r in results),
    "diverged": [[str(r["arm"]), r["seed"], _reason(r)] for r in results if diverged(r)],
  }
  for name in ("num_layers", "model_dim", "num_experts", "num_experts_per_token", "expert_dim"):
    values = [lookup(r, "model", name) for r in results]
    known[name] = _different(x for value in values for x in (value if isinstance(value, list) else [value]))
  speeds = [lookup(r, "training", "tokens_per_second") for r in results]
  speeds = [speed for speed in speeds if isinstance(speed, int | float) and math.isfinite(speed)]
  found: dict[str, Any] = {name: values for name, values in known.items() if values}
  return found | ({"tokens_per_second": statistics.median(speeds)} if speeds else {})


def facts_sentence(facts: dict[str, Any]) -> str:
  """Returns the facts in words; empty if none is known."""
  parts = [
    f"{', '.join(facts['dataset'])} text" if "dataset" in facts else "",
    _model(facts),
    _count(facts, "num_params", "parameters", _counted(facts, "num_active_params", " ({} active)")),
    _count(facts, "num_steps", "steps"),
    _count(facts, "tokens", "tokens", _counted(facts, "bytes", " ({} bytes)")),
    f"median {facts['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in facts else "",
    f"on {', '.join(facts['hardware'])}" if "hardware" in facts else "",
  ]
  text = "; ".join(part for part in parts if part)
  text = text.replace("tokens/s; on ", "tokens/s on ") + ("." if text else "")
  return f"{text} {_padding(facts)}".strip()


def _padding(facts: dict[str, Any]) -> str:
  """Returns a sentence on what of the facts counts padding, and how much that is; "" if there is none."""
  parts = facts.get("padded", [])
  if "tokens" not in facts or (parts and parts[-1] == 0):
    return ""
  counts = ["tokens", *(["bytes"] if "bytes" in facts and not parts else [])]
  counts += ["tokens/s"] if "tokens_per_second" in facts else []
  text = " and ".join(filter(None, (", ".join(counts[:-1]), counts[-1])))
  share = " to ".join(dict.fromkeys(f"{100 * part:.2g}%" for part in (*parts[:1], *parts[-1:])))
  return f"{text[0].upper()}{text[1:]} count padding{f', {share} of them' if share else ''}."


def _model(facts: dict[str, Any]) -> str:
  words = ""
  if "num_layers" in facts and "model_dim" in facts:
    words = f"{_range(facts['num_layers'])} layers of width {_range(facts['model_dim'])}"
  letters = {"num_experts": "E", "num_experts_per_token": "K", "expert_dim": "F"}
  sizes = [f"{letter} = {_range(facts[name])}" for name, letter in letters.items() if name in facts]
  return ", ".join([words, *sizes] if words else sizes)


def _count(facts: dict[str, Any], name: str, unit: str, more: str = "") -> str:
  return f"{_range(facts[name])} {unit}{more}" if name in facts else ""


def _counted(facts: dict[str, Any], name: str, form: str) -> str:
  return form.format(_range(facts[name])) if name in facts else ""


def _range(values: Sequence[float]) -> str:
  """`3`, or `3 to 5`."""
  texts = dict.fromkeys(short(value) for value in (min(values), max(values)))
  return " to ".join(texts)


def short(value: float) -> str:
  """Returns `12,345`, and from a million on three digits, `1.23M`."""
  if value < 1e5:
    return f"{value:,.0f}"
  scale, letter = next((s, x) for s, x in ((1e9, "B"), (1e6, "M"), (1.0, "")) if value >= s or s == 1.0)
  return f"{value / scale:.3g}{letter}" if letter else f"{value:,.0f}"


def _different(values: Iterable[Any]) -> list[Any]:
  return sorted({value for value in values if value is not None})


def _reason(result: Result) -> str:
  """Why a run diverged, without its name, and without what may help: `loss nan at step 7`."""
  return diverged(result).removeprefix(f"{result['arm']} seed {result['seed']} has ").partition(";")[0]


def _eval_batches(result: Result) -> int | None:
  """The limit of an evaluation, or None where it was over the whole validation set or the result does not say."""
  limit = result.get("eval_batches", lookup(result, "config", "train", "eval_batches"))
  return limit if isinstance(limit, int) and limit > 0 else None


def _tokens(result: Result) -> int | None:
  steps, per_step = result.get("num_steps"), result.get("tokens_per_step")
  return None if steps is None or per_step is None else steps * per_step


def _bytes(result: Result) -> int | None:
  """Of the text that was read, with padding where a result does not say how much that is."""
  tokens, per_token = _tokens(result), result.get("bytes_per_token")
  text = 1 - (result.get("padded_fraction") or 0)
  return None if tokens is None or per_token is None else round(tokens * text * per_token)


def _padded(results: Sequence[Result]) -> list[float]:
  """The different parts of the tokens that are padding; [] if a result with tokens does not say it."""
  parts = [r.get("padded_fraction") for r in results if _tokens(r) is not None]
  return [] if None in parts else _different(parts)


def _swept(result: Result) -> str | None:
  swept = result.get("swept")
  if not swept:
    return None
  seeds = ", ".join(map(str, swept["seeds"]))
  return f"{', '.join(swept['fields'])}, chosen by {swept['goal']} on seeds {seeds}"


def _hardware(result: Result) -> str | None:
  device, cores = result.get("device"), result.get("cpu_cores")
  if device is None:
    return None
  return f"{device}, {cores} CPU cores" if cores else str(device)
