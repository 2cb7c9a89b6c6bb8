"""What a model costs and what it is worth where it is used: models that came from one, side by side."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from moe_jax.adapt.layers import moe_layers, take_apart
from moe_jax.adapt.routes import max_vio
from moe_jax.analysis.accounting.parameters import count
from moe_jax.comparison.report import canvas
from moe_jax.data import Dataset
from moe_jax.errors import InputError
from moe_jax.inference.evaluate import ALL, evaluate, reading_speed
from moe_jax.nn.transformer import Transformer


def measure(model: Transformer, dataset: Dataset, batches: int = 0, route_batches: int = 8) -> dict[str, Any]:
  """Returns a line of a table.

  `bits_per_byte` (None where text has no bytes), `perplexity`, `parameters`, `active` (those that a token uses),
  `bytes` (of all arrays, as they are stored), `max_vio` (mean over layers; None: no experts), `tokens_per_second` (that
  this machine reads), and `in DOMAIN` for each domain, in the unit of `bits_per_byte` or in nats per token.

  Args:
    model: predicts next tokens.
    dataset: with the tokenizer of the model.
    batches: of the validation text; 0: all.
    route_batches: of these, those that MaxVio is counted over.
  """
  size = dataset.config.batch_size
  scores = evaluate(model, dataset, size, batches)
  value = lambda score: score.nll if score.bits_per_byte is None else score.bits_per_byte
  counted = count(model)
  return {
    "bits_per_byte": scores[ALL].bits_per_byte,
    "perplexity": scores[ALL].perplexity,
    "parameters": counted.parameters.total,
    "active": counted.active.all,
    "bytes": stored_bytes(model),
    "max_vio": _max_vio(model, dataset, min(route_batches, batches or route_batches)),
    "tokens_per_second": round(reading_speed(model, dataset, size)),
    **{f"in {name}": value(score) for name, score in scores.items() if name != ALL},
  }


def stored_bytes(model: Transformer) -> int:
  """Returns the bytes of all arrays of a model, in the types in which they are stored."""
  return sum(x.nbytes for x in jax.tree.leaves(nnx.state(model)))


def _max_vio(model: Transformer, dataset: Dataset, batches: int) -> float | None:
  try:
    moe_layers(take_apart(model))
  except InputError:
    return None
  return float(max_vio(model, dataset.validation_batches(limit=batches)).mean())


def plot_cost(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> canvas.Plot:
  """Draws what each model predicts against its bytes and against its speed.

  Args:
    path: of the picture.
    rows: of `measure`, each with a `model`, its name.
  """
  import matplotlib
  from matplotlib import ticker

  has_bytes = rows[0]["bits_per_byte"] is not None
  loss = [row["bits_per_byte"] if has_bytes else np.log(row["perplexity"]) for row in rows]
  with matplotlib.rc_context(canvas.RC):
    figure = canvas.figure(8.6, 3.4)
    axes = figure.subplots(1, 2, sharey=True, gridspec_kw={"wspace": 0.08})
    for ax, key, title in zip(axes, ("bytes", "tokens_per_second"), ("bytes", "tokens/s read"), strict=True):
      for i, row in enumerate(rows):
        style = canvas.style(i) | {"linestyle": ""}
        ax.plot(row[key], loss[i], label=row["model"], ms=6, **style)
      ax.set_xlabel(title)
      ax.xaxis.set_major_locator(ticker.MaxNLocator(5))
      ax.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    axes[0].set_ylabel("bits per byte" if has_bytes else "nats per token")
    axes[1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
  caption = "Low is better; so is left in the first picture, and right in the second. All models come from one dense one."
  return canvas.save(figure, path, caption, wide=True)
