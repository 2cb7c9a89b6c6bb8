"""A small dense model and its neighbours, for the laws of adaptations."""

import dataclasses
import functools
import hashlib

import jax
import numpy as np
from flax import nnx

from moe_jax.adapt.layers import put_together, take_apart
from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.nn.context import Context
from moe_jax.nn.transformer import Transformer
from tests import tiny
from tests.nn.layer import initialised

SPARSE = MoEConfig(num_experts=8, num_experts_per_token=2, expert_dim=16)
CONFIG = dataclasses.replace(tiny.CONFIG.model, moe=SPARSE, dense_dim=16, remat="none")
DENSE = dataclasses.replace(CONFIG, ffn="mlp")
TOKENS_BL = tiny.make_batch()["tokens_BL"]


@functools.cache
def model(config: ModelConfig = CONFIG, seed: int = 0) -> Transformer:
  return initialised(lambda: Transformer(config, tiny.VOCAB, rngs=nnx.Rngs(seed)))


@jax.jit
def forward(model: Transformer, tokens_BL=TOKENS_BL):
  return model(tokens_BL)


def logits(model: Transformer) -> np.ndarray:
  return np.asarray(forward(model)[0])


@jax.jit
def with_routes(model: Transformer):
  """(logits, selected_BLE of every layer with experts)."""
  logits_BLV, aux = model(TOKENS_BL, Context(record_logits=True))
  return logits_BLV, aux


def hashes(model: Transformer) -> dict[str, str]:
  """A digest of every variable of every layer, by its path."""
  parts = take_apart(model)
  digest = lambda value: hashlib.sha256(
    b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(value))
  ).hexdigest()
  found = {path: digest(value) for path, value in parts.values.items()}
  for i, layer in enumerate(parts.layers):
    found |= {f"{i}.{path}": digest(value) for path, value in layer.values.items()}
  return found


def trained(model):
  """`model` with adapters that are not zero."""
  parts, rng = take_apart(model), np.random.default_rng(0)
  draw = lambda path, x: rng.normal(size=x.shape).astype(np.float32) / 4 if ".up." in path else x
  layers = [
    layer._replace(values={path: draw(path, x) for path, x in layer.values.items()}) for layer in parts.layers
  ]
  return put_together(parts._replace(layers=tuple(layers)))
