"""A dense model of the shape of a sparse one, to be distilled into."""

import dataclasses

from moe_jax.adapt.layers import Layer, moe_layers, put_together, take_apart
from moe_jax.errors import InputError
from moe_jax.nn.transformer import Transformer


def to_dense(model: Transformer, dense_dim: int = 0, seed: int = 0) -> Transformer:
  """Returns a dense model with all parameters of `model` but those of its layers with experts (2101.03961, section 4.2).

  Their place is taken by dense parts with new parameters.

  Args:
    model: has experts.
    dense_dim: the width of the new parts; 0: that of the dense parts of the configuration, `dense_dim`.
    seed: of the new parameters.

  Raises:
    InputError: if the model has no experts, or dense parts of another width.
  """
  parts = take_apart(model)
  routed = set(moe_layers(parts))
  width = dense_dim or parts.config.dense_dim
  if width != parts.config.dense_dim and any("ffn.w_up_DF" in layer.values for layer in parts.layers):
    raise InputError(
      f"dense_dim={width}: the model has dense parts of width {parts.config.dense_dim}; leave it at 0"
    )
  config = dataclasses.replace(parts.config, dense_dim=width)
  dense = lambda layer: Layer(dataclasses.replace(layer.block, ffn=config.dense_ffn), layer.without("ffn."))
  layers = tuple(dense(layer) if i in routed else layer for i, layer in enumerate(parts.layers))
  return put_together(parts._replace(config=config, layers=layers), seed)
