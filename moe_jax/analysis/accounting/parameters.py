"""Counts the parameters of a model by kind, and those that one token uses."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
from flax import nnx

from moe_jax.nn.experts.quantised import quantised_size
from moe_jax.nn.ffn import SoftMoE
from moe_jax.nn.moe import MoE
from moe_jax.nn.transformer import Transformer

MODULES = "successors"  # the attribute of a model that has them


class Parameters(NamedTuple):
  """Numbers of parameters by kind."""

  embedding: int = 0
  head: int = 0  # the output matrix; 0: it is the embedding
  attention: int = 0  # token mixers of any kind, without their norms
  dense: int = 0  # feed-forward parts without experts, and those beside experts
  experts: int = 0  # routed experts
  shared_experts: int = 0
  router: int = 0
  expert_bias: int = 0  # of balancers: moves choices, has no gradient, and is part of a checkpoint
  norms: int = 0

  @property
  def total(self) -> int:
    return sum(self)

  def __add__(self, other: tuple) -> "Parameters":
    return Parameters(*(a + b for a, b in zip(self, other, strict=True)))


class Active(NamedTuple):
  """Parameters that one token uses, in the three conventions of the literature.

  A token looks up one row of the embedding, so some do not count it. A matrix that is both embedding and output
  matrix counts as the latter.
  """

  all: int  # with embedding and output matrix: Mixtral, OLMoE, Qwen3
  head: int  # without the embedding: gpt-oss, DeepSeek-V2-Lite
  none: int  # without both: MiniMax-01


class Counted(NamedTuple):
  """Parameters of a model or a part of it, and of these the ones that a token uses.

  A router may decide how many experts a token gets. K of them count as `used`, which many such routers aim at on average,
  and the most that it may choose as `used_at_most`.
  """

  parameters: Parameters = Parameters()
  used: Parameters = Parameters()
  used_at_most: Parameters = Parameters()

  def __add__(self, other: tuple) -> "Counted":
    return Counted(*(a + b for a, b in zip(self, other, strict=True)))

  @property
  def active(self) -> Active:
    return _active(self.used)

  @property
  def active_at_most(self) -> Active:
    return _active(self.used_at_most)


def _active(used: Parameters) -> Active:
  looked_up = used.embedding if used.head else 0
  return Active(used.total, used.total - looked_up, used.total - used.embedding - used.head)


def count(model: Transformer) -> Counted:
  """Counts `model`, whose parameters may be abstract, without its modules of multi-token prediction."""
  kinds = {"embedding_VD": "embedding", "w_head_DV": "head"}
  found = Counted()
  for path, size, axes in parameters_of(model):
    if path[0] not in ("segments", MODULES):
      own = Parameters(**{kinds.get(path[0]) or _kind(path, axes): size})
      found += Counted(own, own, own)
  for segment in model.segments:
    for block in segment.pattern.blocks:
      found += count_block(block, segment.repeats)
  return found


def count_modules(model: Transformer) -> int:
  """Returns the parameters of its modules of multi-token prediction, which share embedding and output matrix."""
  sizes = sum(size for path, size, _ in parameters_of(model) if path[0] == MODULES)
  layers = [module for _, module in nnx.iter_modules(model.successors) if isinstance(module, MoE)]
  return sizes + sum(map(_bias_size, layers))


def count_block(block: nnx.Module, repeats: int) -> Counted:
  """Counts a block whose variables are stacked over `repeats` layers."""
  sizes = dict.fromkeys(Parameters._fields, 0)
  for path, size, axes in parameters_of(block):
    sizes[_kind(path, axes)] += size
  sizes["experts"] += quantised_size(block)
  layers = [module for _, module in nnx.iter_modules(block) if isinstance(module, MoE)]
  sizes["expert_bias"] = repeats * sum(map(_bias_size, layers))
  every = Parameters(**sizes)
  # Every slot of Soft MoE mixes all tokens, and every token all slots.
  if any(isinstance(module, SoftMoE) for _, module in nnx.iter_modules(block)):
    return Counted(every, every, every)
  without = lambda k_of: every._replace(
    experts=every.experts - sum(_unused(layer, k_of(layer)) for layer in layers)
  )
  usual = without(lambda layer: layer.num_experts_per_token)
  return Counted(every, usual, without(lambda layer: layer.router.most or layer.num_experts_per_token))


def _unused(layer: MoE, k: int) -> int:
  """Returns the parameters of the routed experts of a layer that a token with `k` of them does not use."""
  size = sum(size for path, size, axes in parameters_of(layer.experts) if _kind(path, axes) == "experts")
  size += quantised_size(layer.experts)
  return size - size * k // layer.num_experts


def parameters_of(module: nnx.Module) -> Iterator[tuple[tuple, int, tuple[str, ...]]]:
  """(path, number of elements, logical axes) of each parameter."""
  for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
    yield path, math.prod(variable.get_value().shape), variable.get_metadata()["logical_axes"]


def _kind(path: tuple, axes: tuple[str, ...]) -> str:
  if "router" in path or "router" in axes:
    return "router"
  if "norm" in axes:
    return "norms"
  if "mixer" in path:
    return "attention"
  if axes[:1] == ("expert",):
    return "experts"
  return "shared_experts" if "shared" in path else "dense"


def _bias_size(layer: MoE) -> int:
  bias = jax.eval_shape(lambda: layer.balancer.bias(layer.balancer.init(layer.num_scored_experts)))
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(bias))
