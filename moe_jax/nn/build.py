"""From a configuration to parts. Names are resolved here, and the parts of every block are built here."""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Iterator
from typing import Any

from flax import nnx

from moe_jax.config import BlockConfig, ModelConfig, MoEConfig, Segment, spec_text
from moe_jax.errors import InputError
from moe_jax.nn.block import Block
from moe_jax.nn.checks import check_balancer
from moe_jax.nn.experts import EXPERTS
from moe_jax.nn.ffn import FFNS, SHARED_EXPERTS
from moe_jax.nn.mixers import MIXERS
from moe_jax.nn.moe import MoE
from moe_jax.nn.own_experts import check_empty_slots
from moe_jax.nn.own_parts import check_axes, check_forward, check_router
from moe_jax.nn.residual import RESIDUALS
from moe_jax.nn.routers import ROUTERS
from moe_jax.nn.variables import abstract
from moe_jax.ops.balancing import BALANCERS
from moe_jax.ops.metrics import is_taken
from moe_jax.sharding.dispatchers import DISPATCHERS

_MOE_PARTS = {
  "router": ROUTERS,
  "experts": EXPERTS,
  "shared_experts": SHARED_EXPERTS,
  "dispatcher": DISPATCHERS,
}
_BLOCK_PARTS = {"mixer": MIXERS, "ffn": FFNS, "residual": RESIDUALS}


@contextlib.contextmanager
def naming(flag: str, value: Any) -> Iterator[None]:
  """Adds the flag to the message of an `InputError` that a part raises about its options."""
  try:
    yield
  except InputError as error:
    text = str(error)
    raise error if text.startswith("--") else InputError(f"--{flag}={spec_text(value)}: {text}") from None


def resolve_moe(config: MoEConfig) -> MoEConfig:
  """Returns `config` with a `Method` in place of every name. Raises `InputError` that names the flag."""
  methods: dict[str, Any] = {}
  for name, registry in _MOE_PARTS.items():
    with naming(name, getattr(config, name)):
      methods[name] = registry.resolve(getattr(config, name))
  with naming("balancers", config.balancers):
    methods["balancers"] = BALANCERS.resolve_all(config.balancers)
    for method in methods["balancers"]:
      if is_taken(method.name):  # its loss would hide that number, or be hidden by it
        raise InputError(
          f"balancer {method.name}: another number in the logs has this name; rename the one of yours"
        )
      for option in ("weight", "rate"):
        if dict(method.options).get(option, 0) < 0:
          raise InputError(f"balancer {method.name}: {option} must be 0 or more: a negative one unbalances")
  return dataclasses.replace(config, **methods)


def resolve(config: ModelConfig) -> ModelConfig:
  """Returns `config` with a `Method` in place of every name, checked. No code below this reads a name.

  Raises:
    InputError: if a name is unknown, an option is wrong, or parts do not fit together. The message names the
      flag.
  """
  config.check()
  parts: dict[str, Any] = {"moe": resolve_moe(config.moe)}
  for name, registry in _BLOCK_PARTS.items():
    with naming(name, getattr(config, name)):
      parts[name] = registry.resolve(getattr(config, name))
  parts["dense_ffn"] = FFNS.resolve(config.dense_ffn)
  parts["segments"] = tuple(_resolve_segment(segment) for segment in config.segments)
  config = dataclasses.replace(config, **parts)
  for block in different_blocks(config):
    abstract_ffn(block)
    _check_block(config, block)
    _check_unrouted(block)
  return config


def _check_unrouted(block: BlockConfig) -> None:
  """A part with experts and without a router would ignore these fields without a word."""
  if routed_part(block) is not None or "moe" not in inspect.signature(block.ffn.factory).parameters:
    return
  default = resolve_moe(MoEConfig())
  for field in ("router", "balancers", "group_size", "jitter"):
    value, usual = getattr(block.moe, field), getattr(default, field)
    if value != usual:
      text = f"--{field}={spec_text(value)}: --ffn={block.ffn} does not route"
      raise InputError(f"{text}; leave it at {spec_text(usual)}")


def _resolve_segment(segment: Segment) -> Segment:
  def block(config: BlockConfig) -> BlockConfig:
    parts: dict[str, Any] = {n: r.resolve(getattr(config, n)) for n, r in _BLOCK_PARTS.items()}
    return dataclasses.replace(config, **parts, moe=config.moe and resolve_moe(config.moe))

  return Segment(tuple(map(block, segment.pattern)), segment.repeats)


def make_blocks(config: ModelConfig, segment: Segment, rngs: nnx.Rngs) -> list[Block]:
  """Returns the blocks of one repetition of a resolved segment."""
  common = ("num_heads", "num_kv_heads", "head_dim", "rope_theta", "qk_norm", "norm_eps", "causal")
  common += ("dense_dim", "activation", "init_scale")
  offered = {name: getattr(config, name) for name in common} | {"dim": config.model_dim, "rngs": rngs}
  offered["num_layers"] = config.total_layers

  def make(block: BlockConfig) -> Block:
    mixer = block.mixer(**offered)
    return Block(mixer, block.ffn(moe=block.moe, **offered), functools.partial(block.residual, **offered))

  return [make(block) for block in segment.pattern]


@functools.lru_cache(maxsize=256)
def _check_block(config: ModelConfig, block: BlockConfig) -> None:
  """Builds a resolved block without computing anything, so that errors about options and own parts are raised now."""
  make = lambda: make_blocks(config, Segment((block,)), nnx.Rngs(0))[0]
  try:
    with _naming_of(block.moe):
      check_axes(block, abstract(make))
      check_forward(config, block, make)
  except InputError as error:
    kind = str(error).partition(" ")[0]
    if kind not in _BLOCK_PARTS:
      raise
    raise InputError(f"--{kind}={getattr(block, kind)}: {error}") from None


def different_blocks(config: ModelConfig) -> tuple[BlockConfig, ...]:
  """Returns the different blocks of a model, in the order in which they first occur."""
  return tuple(dict.fromkeys(block for segment in config.blocks for block in segment.pattern))


@functools.lru_cache(maxsize=256)
def abstract_ffn(block: BlockConfig) -> nnx.Module:
  """Returns the feed-forward part of a resolved block, narrow and without parameters, to read its attributes.

  Raises:
    InputError: if its parts do not fit together or do not support the numbers of experts. The message names
      the flag.
  """
  sizes = {"dim": 8, "dense_dim": 8, "activation": "swiglu", "init_scale": 1.0}
  with _naming_of(block.moe):
    ffn = abstract(lambda: block.ffn(moe=block.moe, rngs=nnx.Rngs(0), **sizes))
    for _, layer in nnx.iter_modules(ffn):
      if isinstance(layer, MoE):
        for method in block.moe.balancers:
          if method.source:  # a user's; tests check those of this package
            check_balancer(method.name, method(), layer.num_scored_experts, layer.num_experts_per_token)
        if block.moe.router.source:
          check_router(block.moe.router, block.moe.balancers, layer)
        if block.moe.experts.source:
          check_empty_slots(block.moe.experts, block.moe.expert_dim)
    return ffn


def routed_part(block: BlockConfig) -> MoE | None:
  """Returns the MoE layer of a resolved block, without parameters, or None if the block has none."""
  return next((m for _, m in nnx.iter_modules(abstract_ffn(block)) if isinstance(m, MoE)), None)


@contextlib.contextmanager
def _naming_of(moe: MoEConfig) -> Iterator[None]:
  """Adds the flag to the message of an `InputError` that a layer raises.

  The first word of the message tells which.
  """
  try:
    yield
  except InputError as error:
    text = str(error)
    flag = next((part for part in _MOE_PARTS if text.startswith(f"{part} ")), None)
    if flag is None and text.startswith(("balancer", "the balancer")):
      flag = "balancers"
    if text.startswith("num_experts"):
      raise InputError(f"--{text}") from None
    raise (InputError(f"--{flag}={spec_text(getattr(moe, flag))}: {text}") if flag else error) from None


def routed_layer(moe: MoEConfig) -> MoE:
  """Returns the MoE layer of `moe`, without parameters. Raises `InputError` as `resolve` does."""
  return abstract_ffn(BlockConfig(ffn=FFNS.resolve("moe"), moe=resolve_moe(moe)))


def routed_layers(config: ModelConfig) -> tuple[int, ...]:
  """Returns the numbers, in the stack of a resolved model, of the R blocks that have routed experts."""
  blocks = [block for segment in config.blocks for block in segment.pattern * segment.repeats]
  return tuple(i for i, block in enumerate(blocks) if routed_part(block) is not None)


def num_routed_layers(config: ModelConfig) -> int:
  """Returns R, the number of layers of a resolved model that have routed experts."""
  return sum(  # without a list, which a wrong number of layers would make too long
    segment.repeats
    for segment in config.blocks
    for block in segment.pattern
    if routed_part(block) is not None
  )
