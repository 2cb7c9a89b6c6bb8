"""The validation of a model that is at hand, as a run would validate it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.config import Config
from moe_jax.data import Dataset
from moe_jax.nn.transformer import Transformer
from moe_jax.training.compiled import objective_of
from moe_jax.training.objectives import Objective
from moe_jax.training.results import validation_summary
from moe_jax.training.step import EvalSums, TrainState, make_eval_step


def validate(model: Transformer, config: Config, dataset: Dataset) -> dict[str, Any]:
  """Returns the `validation` part of a result: the loss of the objective, MaxVio and other metrics per layer.

  Args:
    model: where its parameters are, it is computed.
    config: resolved; its objective and `eval_batches` are used.
    dataset: its validation split is read.
  """
  graphdef, params, variables = nnx.split(model, nnx.Param, ...)
  state = TrainState(jnp.int32(0), jnp.zeros(2, jnp.uint32), params, variables, (), ())
  info, total = dataset.info, None
  limit = config.train.eval_batches
  for batch in dataset.validation_batches(limit=limit):
    sums = _sums(graphdef, objective_of(config), len(info.domains), info.vocab_size, state, batch)
    sums = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(sums))
    total = sums if total is None else jax.tree.map(np.add, total, sums)
  # The likelihood of a text is a product over its tokens in order, which a masked objective does not give.
  causal = config.model.causal
  num_bytes = dataset.validation_bytes(float(total.num_targets), limit) if causal else None
  return validation_summary(total, num_bytes)


def losses_by_domain(model: Transformer, config: Config, dataset: Dataset) -> dict[str, float]:
  """Returns the loss of the objective in nats per target, for each domain that the validation batches have.

  The arguments are those of `validate`.
  """
  return {name: nll / n for name, (nll, n) in sums_by_domain(model, config, dataset).items()}


def sums_by_domain(model: Transformer, config: Config, dataset: Dataset) -> dict[str, tuple[float, float]]:
  """Returns the loss of the objective in nats, and the number of targets, for each domain that the validation batches have.

  The arguments are those of `validate`.
  """
  objective, info = objective_of(config), dataset.info
  graphdef, params, variables = nnx.split(model, nnx.Param, ...)
  state = TrainState(jnp.int32(0), jnp.zeros(2, jnp.uint32), params, variables, (), ())
  sums = np.zeros((len(info.domains), 2))
  for batch in dataset.validation_batches(limit=config.train.eval_batches):
    for i in np.unique(batch["domain_B"][batch["mask_BL"].any(axis=1)]):
      is_own_B1 = (batch["domain_B"] == i)[:, None]
      masks = {name: x & is_own_B1 for name, x in batch.items() if x.dtype == bool}
      found = _sums(graphdef, objective, len(info.domains), info.vocab_size, state, batch | masks)
      sums[i] += float(found.nll), float(found.num_targets)
  return {name: (float(nll), float(n)) for name, (nll, n) in zip(info.domains, sums, strict=True) if n}


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _sums(
  graphdef: nnx.GraphDef,
  objective: Objective,
  num_domains: int,
  vocab_size: int,
  state: TrainState,
  batch: dict,
) -> EvalSums:
  model = nnx.merge(graphdef, state.params, state.variables)
  return make_eval_step(model, objective, num_domains, vocab_size)(state, batch)
