"""A few real steps of a tiny model, whose router logits are recorded beside what the run chose."""

import types
from typing import NamedTuple

import jax
import numpy as np

from moe_jax import sharding
from moe_jax.training.compiled import check_run, compile_steps
from moe_jax.training.protocol import trace_header
from moe_jax.training.router_trace import Trace, TraceWriter
from tests import tiny

CONFIG = tiny.change(tiny.CONFIG, record_router_logits=1, router_logits_dtype="float32")
STEPS = 6


class Recorded(NamedTuple):
  trace: Trace
  tokens_per_expert_IRE: np.ndarray
  max_vio_IR: np.ndarray
  state_leaves: list[list[np.ndarray]]  # of the balancers, before each step and after the last


def train(folder, **fields) -> Recorded:
  """A few real steps of a model, recorded, on batches with padding."""
  config = tiny.change(CONFIG, **fields)
  mesh = sharding.make_mesh(config.mesh)
  metrics = []
  header = trace_header(check_run(config, mesh), types.SimpleNamespace(domains=(), fingerprint=""))
  with jax.set_mesh(mesh), TraceWriter(folder, header) as writer:
    steps = compile_steps(config, tiny.VOCAB, tiny.DOMAINS, mesh)
    state = steps.init(0)
    leaves = [jax.device_get(jax.tree.leaves(state.variables))]
    for step in range(1, STEPS + 1):
      batch = jax.device_put(tiny.make_batch(seed=step), sharding.batch_sharding(mesh))
      state, found = steps.train(state, batch)
      writer.add(step, found.pop("router_trace"))
      metrics.append(jax.device_get(found))
      leaves.append(jax.device_get(jax.tree.leaves(state.variables)))
  stacked = [np.stack([m[name] for m in metrics]) for name in ("tokens_per_expert", "max_vio")]
  return Recorded(Trace(folder), *stacked, leaves)
