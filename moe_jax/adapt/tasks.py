"""From token-level to task-level routing: the experts of a token follow from the domain of its text (2110.03742)."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from moe_jax.adapt.experts import Calibrations
from moe_jax.adapt.layers import moe_layers, put_together, take_apart
from moe_jax.errors import InputError
from moe_jax.nn.routers import ROUTERS
from moe_jax.nn.transformer import Transformer


def to_task_level(model: Transformer, domains: Sequence[Calibrations]) -> Transformer:
  """Returns `model` with a row of logits per domain in place of its routers: the log of their mean distribution on it.

  A token of a domain then takes the K experts that have the highest mean probability on the domain, so for one domain `prune` with
  `probability_E` and K experts computes the same. It is the conversion of a trained model; the paper trains with such
  routers (2110.03742, section 3.1) and compares with choosing by counts.

  Args:
    model: has experts.
    domains: `calibrate` on text of each domain, in the order of the data set.

  Raises:
    InputError: if there is no domain, or the model has no experts.
  """
  if not domains:
    raise InputError("to_task_level: needs a calibration of each domain, got none")
  parts = take_apart(model)
  layers = list(parts.layers)
  for i in moe_layers(parts):
    layer = layers[i]
    logits_SE = np.log(np.stack([found[i].probability_E for found in domains]) + 1e-30).astype(np.float32)
    router = ROUTERS.resolve(f"task_level:tasks={len(domains)}")
    block = dataclasses.replace(layer.block, moe=dataclasses.replace(layer.block.moe, router=router))
    values = layer.without("ffn.router.") | {"ffn.router.w_task_SE": logits_SE}
    layers[i] = layer._replace(block=block, values=values)
  return put_together(parts._replace(layers=tuple(layers)))
