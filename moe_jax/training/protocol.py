"""What a result says of its model, so that tables can tell which runs may be compared (docs/fair_comparison.md)."""

import math
import os
from typing import Any

from flax import nnx

from moe_jax import sharding
from moe_jax.config import BlockConfig, Config, ModelConfig, Segment
from moe_jax.config.plain import to_plain
from moe_jax.data import DatasetInfo
from moe_jax.nn.build import different_blocks, make_blocks, routed_layers, routed_part
from moe_jax.nn.experts.quantised import quantised_size
from moe_jax.nn.ffn import MLP, LatentMoE, SoftMoE
from moe_jax.nn.moe import MoE
from moe_jax.nn.variables import abstract, matrix_sizes
from moe_jax.ops.dispatch import expert_capacity
from moe_jax.registry import Method
from moe_jax.training.own_leaks import sees_later_tokens


def protocol_of(config: Config) -> dict[str, Any]:
  """Returns the part of a result that depends on the resolved configuration alone.

  schedule: the configuration of the optimizer.
  tail_steps: the last steps of training, over which noisy metrics are averaged.
  sequence_length: tokens of a sequence, in training and evaluation.
  eval_sequences: sequences of the validation set that are evaluated; 0: all.
  active_width: the hidden width that a token meets in a feed-forward part: K * F of the routed experts, and that
    of shared experts and parallel parts. K is the maximum if a router chooses how many. Where experts read a
    narrower space of width X, K * F * X / D, so that it stays in proportion to the work of the experts. For Soft
    MoE, F * slots of all experts / tokens of a sequence. A list if blocks differ; None: not known, because a part of a user's
    has matrices of its own, which only `ffn_work` counts.
  ffn_work: the elements of the matrices by which a token is multiplied in the feed-forward parts of all layers, counted as
    for `active_width`: those of K experts, at most, of shared experts and of parallel and dense parts. It knows how often
    a block is repeated, and how many matrices an expert has. Those of a user's part count whole. Routers, the projections
    of `latent_moe`, adapters and biases do not count. None: not known, because a part of a user's has experts outside of a
    layer that says how many a token gets.
  num_layers, model_dim: of the model; two models of equal work may differ in them.
  max_vio_range: E / K of the layers with experts, which bounds MaxVio: it is at most E / K - 1. E counts experts without work,
    too, where tokens may choose them. K is the fewest experts that a token may get, but at least 1, so it is 1 for a
    router that gives some tokens one expert or none; Soft MoE has K = 1. A list if layers differ; None if there are none.
  sees_later_tokens: whether the model is causal and looks at them nonetheless; None: not known, because a part of a user's could
    not be measured.
  slots: what bounds the tokens of an expert, e.g. "capacity 1.25/2 per group of 128" (training/evaluation), or
    "dropless" if nothing does. Where the mesh decides which groups of a micro-batch share slots or a buffer, their number
    on the mesh of the configuration, on the devices here.
  inputs: what routers read beside hidden states and token ids, which a language model does not know when it
    generates: "domain", or "".
  model: sizes for captions.
  cpu_cores: of this machine.
  """
  length = config.data.sequence_length
  ffns = {block: _ffn(config.model, block) for block in different_blocks(config.model)}
  parts = {block: _parts(ffn) for block, ffn in ffns.items()}
  layers = {block: part for block, found in parts.items() for part in found if isinstance(part, MoE)}
  with_experts = [b for b, found in parts.items() if any(isinstance(p, MoE | SoftMoE) for p in found)]
  widths = {_active_width(block, ffn, length) for block, ffn in ffns.items()}
  widths = [] if None in widths else sorted(widths - {0})
  blocks = [(block, segment.repeats) for segment in config.model.blocks for block in segment.pattern]
  works = [(repeats, _work(ffns[block], length)) for block, repeats in blocks]
  num_layers = config.model.total_layers
  ranges = sorted({_max_vio_range(part) for found in parts.values() for part in found} - {0.0})
  sizes = ("num_experts", "num_experts_per_token", "expert_dim")
  return {
    "num_steps": config.train.num_steps,
    "tail_steps": math.ceil(config.train.num_steps * config.train.tail_fraction),
    "eval_sequences": config.train.eval_batches * config.data.batch_size,
    "tokens_per_step": config.data.batch_size * length,
    "sequence_length": length,
    "objective": str(config.train.objective),
    "sees_later_tokens": sees_later_tokens(config.model),
    "schedule": to_plain(config.optimizer),
    "active_width": (widths[0] if len(widths) == 1 else widths) or None,
    "ffn_work": None
    if any(work is None for _, work in works)
    else _short(sum(n * work for n, work in works)),
    "num_layers": num_layers,
    "model_dim": config.model.model_dim,
    "max_vio_range": (ranges[0] if len(ranges) == 1 else ranges) or None,
    "slots": _slots(config, layers),
    "inputs": "domain" if any(layer.router.num_tasks for layer in layers.values()) else "",
    "model": {
      "num_layers": num_layers,
      "model_dim": config.model.model_dim,
      **{name: sorted({getattr(block.moe, name) for block in with_experts}) for name in sizes},
    },
    "cpu_cores": os.cpu_count(),
  }


def max_vio_ranges(config: ModelConfig) -> list[float]:
  """Returns `max_vio_range` of each layer with experts of a resolved model, in the order of the stack. 1: it is always 0."""
  of_block = {b: [_max_vio_range(part) for part in _parts(_ffn(config, b))] for b in different_blocks(config)}
  blocks = [block for segment in config.blocks for block in segment.pattern * segment.repeats]
  return [bound for block in blocks for bound in of_block[block] if bound]


def slots_of_mesh(config: Config) -> str:
  """Returns `slots` of `protocol_of` if the mesh of a resolved configuration may decide what is dropped, otherwise ""."""
  if not any(_shared_over(moe.dispatcher) for moe in config.model.moe_configs):
    return ""
  parts = {block: routed_part(block) for block in different_blocks(config.model)}
  return _slots(config, {block: part for block, part in parts.items() if part is not None})


def trace_header(config: Config, info: DatasetInfo) -> dict[str, Any]:
  """Returns what a recorded trace says of the run of a resolved configuration on the text of `info`.

  Of it, `layers` are the numbers of the R layers in the model, on which their random keys depend; those of modules of
  multi-token prediction are not recorded. `moe` is the configuration that all R layers share; None if they differ.
  """
  blocks = [block for block in different_blocks(config.model) if routed_part(block) is not None]
  block, alike = blocks[0], len({block.moe for block in blocks}) == 1
  layer, k = routed_part(block), block.moe.num_experts_per_token
  group = layer.tokens_per_group(config.data.sequence_length)
  return {
    "every": config.train.record_router_logits,
    "layers": list(routed_layers(config.model)),
    "moe": to_plain(block.moe) if alike else None,
    "router": str(block.moe.router),
    "num_experts": layer.num_experts,
    "num_scored_experts": layer.num_scored_experts,
    "num_experts_per_token": k,
    "group_size": group,
    "capacity": expert_capacity(group, k, layer.capacity_factor, layer.num_experts),
    "domains": list(info.domains),
    "fingerprint": info.fingerprint,
    "config": config.to_dict(),
  }


def _ffn(config: ModelConfig, block: BlockConfig) -> nnx.Module:
  """Returns the feed-forward part of a block, with its true sizes and without arrays."""
  (made,) = abstract(lambda: make_blocks(config, Segment((block,)), nnx.Rngs(0)))
  return made.ffn


def _parts(ffn: nnx.Module) -> list[nnx.Module]:
  return [module for _, module in nnx.iter_modules(ffn)]


def _active_width(block: BlockConfig, ffn: nnx.Module, length: int) -> int | float | None:
  width, known = 0, []
  for path, part in nnx.iter_modules(ffn):
    if isinstance(part, MoE):
      most = part.router.most or part.num_experts_per_token
      dim, read = part.w_down_DX.shape if isinstance(part, LatentMoE) else (1, 1)
      width += most * block.moe.expert_dim * read / dim
    elif isinstance(part, SoftMoE):
      _, num_experts, slots = part.w_slots_DEC.shape
      width += num_experts * slots * block.moe.expert_dim / length
    elif isinstance(part, MLP):
      width += part.w_up_DF.shape[-1]
      known.append(path)
  if any(not _within(path, known) for path, _, _ in _dense_matrices(ffn)):
    return None
  return _short(width)


def _work(ffn: nnx.Module, length: int) -> float | None:
  work = 0.0
  for part in _parts(ffn):
    if isinstance(part, MoE):
      most = part.router.most or part.num_experts_per_token
      work += most * _size(part.experts) / part.num_experts
    elif isinstance(part, SoftMoE):
      slots = part.w_slots_DEC.shape[-1]
      work += slots * _size(part.experts) / length
  dense = _dense_matrices(ffn)
  if any("expert" in axes for _, _, axes in dense):
    return None
  return work + sum(size for _, size, _ in dense)


def _dense_matrices(ffn: nnx.Module) -> list[tuple[tuple, int, tuple[str, ...]]]:
  """(path, elements, logical axes) of the matrices that count and are not of a layer's routed experts: all tokens meet them."""
  others = []
  for path, part in nnx.iter_modules(ffn):
    names = ("experts",) if isinstance(part, MoE | SoftMoE) else ()
    names += ("w_down_DX", "w_up_XD") if isinstance(part, LatentMoE) else ()
    others += [(*path, name) for name in names]
  of_router = lambda path, axes: "router" in path or "router" in axes
  return [
    (path, size, axes)
    for path, size, axes in matrix_sizes(ffn)
    if not _within(path, others) and "adapters" not in path and not of_router(path, axes)
  ]


def _within(path: tuple, modules: list[tuple]) -> bool:
  return any(path[: len(module)] == module for module in modules)


def _size(experts: nnx.Module) -> int:
  """Returns the elements of the matrices of a network of experts, all experts together; those of adapters do not count."""
  kept = (size for path, size, _ in matrix_sizes(experts) if "adapters" not in path)
  return sum(kept) + quantised_size(experts)


def _short(number: float) -> int | float:
  return int(number) if number == int(number) else number


def _max_vio_range(part: nnx.Module) -> float:
  if isinstance(part, SoftMoE):
    return float(part.w_slots_DEC.shape[1])
  if not isinstance(part, MoE):
    return 0.0
  fewest = part.num_experts_per_token if part.router.fewest is None else part.router.fewest
  return part.num_scored_experts / max(fewest, 1)


def _slots(config: Config, layers: dict[BlockConfig, MoE]) -> str:
  return "; ".join(sorted({_slots_of(config, block, layer) for block, layer in layers.items()})) or "dropless"


def _slots_of(config: Config, block: BlockConfig, layer: MoE) -> str:
  if layer.dispatcher.never_drops:
    return "dropless"
  length = config.data.sequence_length
  group, k = layer.tokens_per_group(length), layer.num_experts_per_token
  factors = layer.capacity_factor, layer.eval_capacity_factor
  shared_over = _shared_over(block.moe.dispatcher)
  if shared_over:
    sizes = sharding.make_mesh(config.mesh).shape
    parts = math.prod(sizes[axis] for axis in sharding.BATCH_AXES)
    (exchanging,) = (sizes[axis] for axis in sharding.RULES["expert"])
    groups = config.data.batch_size // config.train.accumulation * length // group // parts  # of one device
  options = dict(block.moe.dispatcher.options)
  buffer = options.get("buffer_factor", 0)
  scope = options.get("capacity", "none" if buffer else "group")
  bounds = []
  if scope != "none" and min(expert_capacity(group, k, f, layer.num_experts) for f in factors) < group:
    shared = ""
    if "capacity" in shared_over:
      shared = f" ({scope}: {groups * (exchanging if scope == 'global' else 1)} groups)"
    bounds.append(f"capacity {factors[0]:g}/{factors[1]:g} per group of {group}{shared}")
  if buffer:  # nothing is sent between the devices of a group of one
    of = f"{groups} groups, {exchanging} devices" if exchanging > 1 else "1 device"
    bounds.append(f"device buffers of {buffer:g} ({of})")
  return ", ".join(bounds) or "dropless"  # also where an expert has a slot for every token


def _shared_over(dispatcher: Method) -> tuple[str, ...]:
  """Returns the options of a dispatcher by which the groups of a device, or of several, share slots or a buffer."""
  options = dict(dispatcher.options)
  over = {
    "capacity": options.get("capacity") in ("device", "global"),
    "buffer_factor": bool(options.get("buffer_factor")),
  }
  return tuple(name for name, shared in over.items() if shared)
