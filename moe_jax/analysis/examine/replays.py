"""The router logits of an examination on disk, and what other balancers would have done with them."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.analysis.replay.replay import bias_methods, replay
from moe_jax.config import Config
from moe_jax.config.plain import to_plain
from moe_jax.data import Batch
from moe_jax.errors import InputError
from moe_jax.nn.build import different_blocks, routed_layers, routed_part
from moe_jax.training.router_trace import Trace, write_by_layer

TAIL = 0.25  # of the updates


@contextlib.contextmanager
def recording(
  folder: pathlib.Path, config: Config, batches: Sequence[Batch]
) -> Iterator[Callable[[int, int, jax.Array], None]]:
  """Keeps the router logits of examined batches in a folder.

  Args:
    folder: of the trace. It must not hold one.
    config: of the model, resolved. Its layers with experts must be alike.
    batches: that are examined.

  Yields:
    What `examine` takes as `see`.
  """
  block = next(b for b in different_blocks(config.model) if routed_part(b) is not None)
  layers = routed_layers(config.model)
  header = {"router": str(block.moe.router), "layers": layers, "moe": to_plain(block.moe)}
  steps = []
  for i, batch in enumerate(batches):
    key_B = jax.random.split(jax.random.key(i + 1), len(batch["domain_B"]))
    data = np.asarray(jax.random.key_data(key_B))
    steps.append({"mask_BL": batch["mask_BL"], "domain_B": batch["domain_B"], "key_B": data})
  with write_by_layer(folder, header, steps, len(layers)) as add:
    limit = float(np.finfo(np.float16).max)
    to_float16 = lambda logits_BLE: np.asarray(jnp.clip(logits_BLE, -limit, limit).astype(jnp.float16))
    yield lambda batch, layer, logits_BLE: add(batch, layer, to_float16(logits_BLE))


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
