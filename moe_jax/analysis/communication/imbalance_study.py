"""The study of imbalance: recorded runs with different balance, under every exchange.

Each run is routed as it was while training: by its own router, with the bias of its own balancers.
"""

import collections
import csv
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax import disk
from moe_jax.analysis.communication import imbalance
from moe_jax.analysis.communication.imbalance import Exchange
from moe_jax.analysis.communication.machine import Machine
from moe_jax.analysis.communication.simulate import Layer, Routed
from moe_jax.analysis.communication.study import check_experts
from moe_jax.analysis.recording import run_folder
from moe_jax.analysis.replay.choices import OwnChoices, check_choices
from moe_jax.comparison.report import canvas
from moe_jax.config import MoEConfig
from moe_jax.errors import InputError
from moe_jax.training.router_trace import Trace

Point = Mapping[str, Any]


def check(
  moe: MoEConfig,
  shape: tuple[int, int, int, int],
  num_steps: int,
  machine: Machine,
  sequences_per_device: int,
  num_batches: int,
) -> None:
  """Checks a study of a run of `moe`, a trace of `num_steps` steps of `shape` (R, B, L, E).

  Raises:
    InputError: if experts or sequences do not fit the machine or the trace, or the choices of the run do not follow
      from a trace.
  """
  check_choices(moe, shape, num_steps)
  _, batch, _, num_experts = shape
  check_experts(machine, num_experts)
  sequences = sequences_per_device * machine.devices
  if sequences % batch or sequences // batch > num_steps:
    raise InputError(
      f"--sequences_per_device={sequences_per_device}: a simulated step of {sequences} sequences must be whole steps "
      f"of the {batch} sequences of a recorded one, of which there are {num_steps}"
    )
  if num_batches < 1:
    raise InputError(f"--num_batches={num_batches}: must be 1 or more")


def points(
  trace: Trace,
  exchanges: Sequence[Exchange],
  machine: Machine,
  layer: Layer,
  *,
  sequences_per_device: int,
  num_batches: int,
) -> Iterator[dict[str, Any]]:
  """Yields a point per simulated step, layer and exchange. Simulated steps lie evenly over the trace.

  Raises:
    InputError: the bias of the run does not follow from the trace.
  """
  choices = OwnChoices(trace)
  num_layers, batch, length, num_experts = trace.shape
  size = sequences_per_device * machine.devices // batch
  sizes = {
    "group_size": length,
    "num_tokens": size * batch * length,
    "num_experts_per_token": choices.num_experts_per_token,
  }
  for start in np.unique(np.linspace(0, len(trace) - size, num_batches).astype(int)):
    steps, selected_IRBLE = choices.read(int(start), int(start) + size)
    for r in range(num_layers):
      selected_TE = selected_IRBLE[:, r].reshape(-1, num_experts)
      routed = _lay(machine, selected_TE)
      even = imbalance.even_seconds(routed, machine, layer)
      count_E = np.bincount(routed.expert_A, minlength=num_experts)
      of_routing = {
        "trace": str(run_folder(trace)),
        "balancers": trace.header["moe"]["balancers"],
        "step": int(steps.step_I[0]),
        "layer": r,
        "max_vio": imbalance.max_vio(count_E),
        "max_vio_of_devices": imbalance.max_vio(count_E.reshape(machine.devices, -1).sum(axis=1)),
      }
      for exchange in exchanges:
        found = imbalance.cost(exchange, routed, machine, layer, **sizes)
        yield of_routing | {
          "exchange": exchange.name,
          "seconds": found.seconds,
          "over_even": found.seconds / even,
          "network_bytes": found.network_bytes,
          "dropped": found.dropped,
        }


def _lay(machine: Machine, selected_TE: np.ndarray) -> Routed:
  """The choices of a simulated step, tokens and experts in equal parts on the devices."""
  tokens, num_experts = selected_TE.shape
  token_A, expert_A = np.nonzero(selected_TE)
  return Routed(machine.place(tokens, "tokens"), machine.place(num_experts, "experts"), token_A, expert_A)


def write(folder: pathlib.Path, found: Sequence[Point], console: Any) -> None:
  """Writes imbalance.csv and imbalance.png, and prints the means of each run."""
  folder.mkdir(parents=True, exist_ok=True)
  with disk.whole_text(folder / "imbalance.csv") as file:
    writer = csv.DictWriter(file, found[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
  print_table(found, console)
  console.print(f"plot: {plot(folder / 'imbalance.png', found).path}", soft_wrap=True)


def print_table(found: Sequence[Point], console: Any) -> None:
  from rich import box
  from rich.table import Table

  exchanges = list(dict.fromkeys(p["exchange"] for p in found))
  table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
  for i, name in enumerate(
    ("balancers", "MaxVio", "of\ndevices", *(e.replace(" ", "\n") for e in exchanges))
  ):
    table.add_column(name, justify="right" if i else "left", no_wrap=i > 0, overflow="fold")
  for trace, name in _names(found).items():
    own = [p for p in found if p["trace"] == trace]
    cells = [f"{np.mean([p[name] for p in own]):.2f}" for name in ("max_vio", "max_vio_of_devices")]
    for exchange in exchanges:
      of = [p for p in own if p["exchange"] == exchange]
      seconds, dropped = (np.mean([p[name] for p in of]) for name in ("over_even", "dropped"))
      cells.append(f"{seconds:.2f}" + (f" ({dropped:.0%})" if exchange != "dropless" else ""))
    table.add_row(name, *cells)
  console.print(table)
  console.print(
    "Means over layers and simulated steps. MaxVio: max/mean - 1 of the pairs of an expert, or of a device. Exchanges: "
    "modelled time of a step over that of even routing without a capacity, and in brackets the share that drops.",
    style="dim",
  )


def _names(found: Sequence[Point]) -> dict[str, str]:
  """What each trace is called: its balancers, and its folder where another one has the same."""
  balancers = {p["trace"]: p["balancers"] for p in found}
  several = collections.Counter(balancers.values())
  return {trace: f"{name} ({trace})" if several[name] > 1 else name for trace, name in balancers.items()}


def plot(path: pathlib.Path, found: Sequence[Point]) -> canvas.Plot:
  """Time over that of even routing, and the share that drops, against MaxVio; a point per simulated step and layer."""
  from matplotlib import rc_context

  with rc_context(canvas.RC):
    figure = canvas.figure(8.6, 3.2)
    axes = figure.subplots(1, 2, gridspec_kw={"wspace": 0.25})
    for index, exchange in enumerate(dict.fromkeys(p["exchange"] for p in found)):
      own = [p for p in found if p["exchange"] == exchange]
      x = [p["max_vio"] for p in own]
      for ax, name in zip(axes, ("over_even", "dropped"), strict=True):
        ax.plot(
          x,
          [p[name] for p in own],
          ls="",
          marker="o",
          ms=3,
          color=canvas.style(index)["color"],
          label=exchange,
        )
    for ax, label in zip(axes, ("modelled step / even routing", "share of pairs dropped"), strict=True):
      ax.set_xlabel("MaxVio of a layer")
      ax.set_ylabel(label)
      ax.set_ylim(bottom=0)
      ax.set_xlim(left=0)
    axes[1].legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), borderaxespad=0.0, fontsize=8)
    return canvas.save(figure, path, "")
