"""Converts balancing coefficients between codebases and papers.

  python scripts/coefficients.py
  python scripts/coefficients.py --source=megatron_lm --weight=0.01 --num_experts=64 --num_layers=16
  python scripts/coefficients.py --source=moe_jax --target=hugging_face --weight=0.02
  python scripts/coefficients.py --source=megablocks_fork --loss=z --weight=0.001

Without --source, the script prints the tables of docs/coefficients.md for the given sizes (Mixtral 8x7B by default).
"""

import math
import sys

from absl import flags

from moe_jax import cli
from moe_jax.disk import note
from moe_jax.errors import InputError

_WEIGHT = flags.DEFINE_float("weight", None, "the coefficient; default 0.01, and 0.001 for the z-loss")
_SOURCE = flags.DEFINE_string("source", None, "where the coefficient is from; omit to print tables of all")
_TARGET = flags.DEFINE_string("target", "moe_jax", "the codebase to convert to")
_LOSS = flags.DEFINE_enum(
  "loss", "load_balancing", ["load_balancing", "z"], "load_balancing or z (router z-loss)"
)
_EXPERTS = flags.DEFINE_integer("num_experts", 8, "E", lower_bound=1)
_K = flags.DEFINE_integer("num_experts_per_token", 2, "K, at most E", lower_bound=1)
_LAYERS = flags.DEFINE_integer("num_layers", 32, "R, layers with experts", lower_bound=1)

WEIGHTS = {"load_balancing": 0.01, "z": 0.001}
TITLES = {"load_balancing": "Load-balancing loss", "z": "Router z-loss"}


def number(value: float) -> str:
  return f"{value:.6g}"


def weight_of(loss: str) -> float:
  return WEIGHTS[loss] if _WEIGHT.value is None else _WEIGHT.value


def formula(convention) -> str:
  """The loss of the whole model at balance with coefficient 1, as text: "R/K", "1/E^2", "1", "0.01*R"."""
  layers = 1 if convention.layers == "sum" else 0
  powers = {"R": layers, "K": convention.choice_power, "E": convention.expert_power}
  text = {letter: letter if abs(power) == 1 else f"{letter}^{abs(power)}" for letter, power in powers.items()}
  above = "*".join(text[letter] for letter, power in powers.items() if power > 0) or "1"
  below = "".join(f"/{text[letter]}" for letter, power in powers.items() if power < 0)
  if convention.factor != 1:
    above = number(convention.factor) + ("" if above == "1" else f"*{above}")
  return above + below + (" per layer" if convention.layers == "caller" else "")


def markdown(header: list[str], rows: list[list[str]]) -> str:
  lines = [header, ["---"] * len(header), *rows]
  return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def meaning(loss: str, sizes: dict[str, int]) -> str:
  """A table with one row per convention: its normalisation, and what the coefficient is worth."""
  from moe_jax.ops.balancing import conventions

  weight, rows = weight_of(loss), []
  for name, convention in conventions.LOSSES[loss].items():
    figures = ["-", "-"]
    if convention.layers != "caller":
      one = conventions.per_layer_weight(weight, name, **sizes, loss=loss)
      here = conventions.convert(weight, name, "moe_jax", **sizes, loss=loss)
      figures = [number(one), number(here)]
    counts = [convention.counts] if loss == "load_balancing" else []
    rows.append([f"`{name}`", *counts, convention.layers, formula(convention), *figures])
  counts = ["choices counted"] if loss == "load_balancing" else []
  unit = "value at balance" if loss == "load_balancing" else "factor"
  shown = number(weight)
  header = [
    "name",
    *counts,
    "layers",
    unit,
    f"weight of one layer for {shown}",
    f"equivalent of {shown} in moe_jax",
  ]
  return markdown(header, rows)


def sources() -> str:
  """A table with one row per convention and loss: where it comes from and what was checked."""
  from moe_jax.ops.balancing import conventions

  rows = [
    [
      f"`{name}`" + (" (z)" if loss == "z" else ""),
      c.title,
      f"`{c.setting}`",
      c.accumulation,
      c.source,
      c.checked,
    ]
    for loss, registry in conventions.LOSSES.items()
    for name, c in registry.items()
  ]
  return markdown(["name", "what", "setting", "micro-batches of a step", "source", "checked"], rows)


def main(argv: list[str]) -> None:
  del argv
  # Imported here so that --help and invalid flags respond immediately.
  from moe_jax.ops.balancing import conventions

  if _K.value > _EXPERTS.value:
    raise InputError(f"--num_experts_per_token={_K.value}: must be at most num_experts={_EXPERTS.value}")
  if _WEIGHT.value is not None and not 0 <= _WEIGHT.value < math.inf:
    raise InputError(f"--weight={_WEIGHT.value}: must be 0 or more, and finite")
  if _SOURCE.value is None and flags.FLAGS["loss"].present:
    note("--loss has no effect without --source: the tables show both")
  sizes = {
    "num_experts": _EXPERTS.value,
    "num_experts_per_token": _K.value,
    "num_layers": _LAYERS.value,
  }
  text = f"E = {_EXPERTS.value}, K = {_K.value}, R = {_LAYERS.value} layers"
  if _SOURCE.value is not None:
    conventions.get_convention(_SOURCE.value, _LOSS.value)
    weight = weight_of(_LOSS.value)
    there = conventions.convert(weight, _SOURCE.value, _TARGET.value, **sizes, loss=_LOSS.value)
    print(f"{number(weight)} in {_SOURCE.value} is {number(there)} in {_TARGET.value} ({text})")
    return
  if flags.FLAGS["target"].present:
    raise InputError(f"--target={_TARGET.value}: needs --source, where the coefficient is from")
  for loss in conventions.LOSSES:
    print(f"### {TITLES[loss]}\n\n{text}.\n\n{meaning(loss, sizes)}\n")
  sys.stdout.write(f"### Sources\n\n{sources()}\n")


if __name__ == "__main__":
  cli.run(main)
