"""The router logits of an examination on disk, and what other balancers would have done with them."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.analysis.replay.replay import bias_methods, replay
from moe_jax.config import Config
from moe_jax.config.plain import to_plain
from moe_jax.data import Batch
from moe_jax.errors import InputError
from moe_jax.nn.build import different_blocks, routed_part
from moe_jax.training.router_trace import Trace, TraceWriter

TAIL = 0.25  # of the updates


class Recorder:
  """Keeps the router logits of examined batches in a folder: a context manager whose `see` takes a batch.

  Args:
    folder: of the trace. It must not hold one.
    config: of the model, resolved. Its layers with experts must be alike.
  """

  def __init__(self, folder: pathlib.Path, config: Config):
    block = next(b for b in different_blocks(config.model) if routed_part(b) is not None)
    moe = to_plain(block.moe)
    header = {"router": str(block.moe.router), "config": {"model": {"moe": moe}}}
    self._writer = TraceWriter(folder, header)
    self._step = 0

  def __enter__(self) -> "Recorder":
    self._writer.__enter__()
    return self

  def __exit__(self, *exception: Any) -> None:
    self._writer.__exit__(*exception)

  def see(self, batch: Batch, logits: Sequence[jax.Array]) -> None:
    """Keeps the router logits [B, L, E] of the layers of one batch."""
    self._step += 1
    key_B = jax.random.split(jax.random.key(self._step), len(batch["domain_B"]))
    limit = float(np.finfo(np.float16).max)
    self._writer.add(
      self._step,
      {
        "logits_RBLE": jnp.clip(jnp.stack(logits), -limit, limit).astype(jnp.float16),
        "mask_BL": batch["mask_BL"],
        "domain_B": np.asarray(batch["domain_B"], np.int32),
        "key_B": jax.random.key_data(key_B),
      },
    )


def can_record(config: Config) -> bool:
  """Returns whether all layers with experts are alike, so that one balancer can be replayed on all of them."""
  routed = [block.moe for block in different_blocks(config.model) if routed_part(block) is not None]
  return len(set(routed)) == 1


def replay_all(folder: pathlib.Path, methods: Sequence[str], num_experts: int) -> list[dict[str, Any]]:
  """Returns a line for every method: as `Replay.tail` gives it.

  Args:
    folder: of the trace.
    methods: balancers with a bias; empty: `none` and all those of the registry.
    num_experts: that the routers score.
  """
  trace, rows = Trace(folder), []
  for method in methods or ["none", *(name for name in bias_methods(num_experts) if name != "none")]:
    try:
      tail = replay(trace, method).tail(TAIL)
    except InputError:
      if methods:
        raise
      continue  # it does not suit the router
    rows.append({"method": method, **tail._asdict()})
  return rows
