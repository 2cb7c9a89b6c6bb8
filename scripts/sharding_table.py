"""Shows how the rules of moe_jax/sharding lay out every parameter and activation on a mesh. Needs no devices.

  python scripts/sharding_table.py --preset=mixtral_8x7b --num_devices=64 --fsdp_parallelism=16 --expert_parallelism=4
  python scripts/sharding_table.py --expert_parallelism=4 --tensor_parallelism=2 --num_devices=8

Each row is one kind of tensor: its logical axes, the mesh axes that split them, and the part that one device holds.
Parameters have a second layout for their products, in which the axes that are split only for storage are whole.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding

from moe_jax import cli, sharding
from moe_jax.config import Config, MoEConfig
from moe_jax.nn.build import abstract_ffn, different_blocks, routed_part
from moe_jax.nn.ffn import MLP, ParallelMoE
from moe_jax.nn.moe import MoE
from moe_jax.ops.dispatch import expert_capacity
from moe_jax.ops.dispatch.common import BY_EXPERT, BY_GROUP
from moe_jax.training.compiled import check_run, make_init
from moe_jax.training.step import TrainState

_DEVICES = flags.DEFINE_integer(
  "num_devices", 0, "devices of the mesh; 0: the product of the axes, counting -1 as 1", lower_bound=0
)
_VOCAB = flags.DEFINE_integer("vocab_size", 32_000, "V, which a run takes from the tokenizer", lower_bound=1)

Axes = tuple[str | None, ...]


class Tensor(NamedTuple):
  """A kind of tensor. `axes` are logical, one per dimension."""

  name: str
  shape: tuple[int, ...]
  axes: Axes
  dtype: Any


def mesh_of(config: Config, num_devices: int) -> AbstractMesh:
  """Returns the mesh of `config` without devices. Raises `InputError` if the axes do not multiply to `num_devices`."""
  asked = [getattr(config.mesh, name) for name in sharding.MESH_AXES]
  sizes = sharding.axis_sizes(config.mesh, num_devices or math.prod(max(size, 1) for size in asked))
  return AbstractMesh(tuple(sizes.values()), tuple(sizes))


def parameters(state: TrainState) -> list[Tensor]:
  """Returns one row per kind of parameter. Parameters of a segment have the axis `layers` in front.

  Names begin with the numbers of segment and block where the model has several.
  """
  flat = nnx.to_flat_state(state.params)
  places = {_place(path) for path, _ in flat} - {()}
  found = []
  for path, variable in flat:
    shape, axes = variable.get_value().shape, variable.get_metadata()["logical_axes"]
    place = _place(path)
    shown = (*(place if len(places) > 1 else ()), *(path[5:] if place else path))
    name = ".".join(map(str, shown))
    found.append(Tensor(name, shape, ("layers",) * (len(shape) - len(axes)) + axes, jnp.float32))
  return found


def _place(path: tuple) -> tuple:
  """(segment, block) of `segments.SEGMENT.pattern.blocks.BLOCK...`; nothing for what is in no segment."""
  return (path[1], path[4]) if path[0] == "segments" else ()


def activations(config: Config, vocab_size: int) -> list[Tensor]:
  """Returns the activations of one training micro-batch. The code constrains the first ones; XLA derives the others."""
  return constrained(config) + derived(config, vocab_size)


def routed_layers(config: Config) -> list[tuple[MoEConfig, MoE]]:
  """The different layers with routed experts: configuration and structure."""
  found = [(block.moe, routed_part(block)) for block in different_blocks(config.model)]
  return [(moe, layer) for moe, layer in found if layer is not None]


def groups_of(config: Config, layer: MoE) -> tuple[int, int, int]:
  """G, T and C of a micro-batch."""
  t = layer.tokens_per_group(config.data.sequence_length)
  groups = config.data.batch_size // config.train.accumulation * config.data.sequence_length // t
  return groups, t, expert_capacity(t, layer.num_experts_per_token, layer.capacity_factor, layer.num_experts)


def constrained(config: Config) -> list[Tensor]:
  """`config` is resolved."""
  model, length = config.model, config.data.sequence_length
  b, d, dtype = config.data.batch_size // config.train.accumulation, model.model_dim, model.compute_dtype
  rows = [Tensor("x_BLD", (b, length, d), ("batch", None, None), dtype)]
  for _, layer in routed_layers(config):
    (g, t, c), e = groups_of(config, layer), layer.num_experts
    rows += [
      Tensor("x_GTD, y_GTD", (g, t, d), ("group", None, None), dtype),
      Tensor("router logits_GTE", (g, t, layer.num_scored_experts), ("group", None, None), "float32"),
    ]
    if not layer.dispatcher.spells_exchange:
      rows += [
        Tensor("slots by group_GECD", (g, e, c, d), BY_GROUP, dtype),
        Tensor("slots by expert_EGCD", (e, g, c, d), BY_EXPERT, dtype),
      ]
  return list(dict.fromkeys(rows))


def derived(config: Config, vocab_size: int) -> list[Tensor]:
  """`config` is resolved."""
  model, length, h = config.model, config.data.sequence_length, config.model.head_dim
  b, dtype = config.data.batch_size // config.train.accumulation, model.compute_dtype
  of_heads = lambda n, axis: ((b, length, n, h), ("batch", None, axis, None), dtype)
  rows = [
    Tensor("query, mixed_BLNH", *of_heads(model.num_heads, "heads")),
    Tensor("key, value_BLNH", *of_heads(model.num_kv_heads, "kv_heads")),
    Tensor("logits_BLV", (b, length, vocab_size), ("batch", None, "vocab"), "float32"),
  ]
  for moe, layer in routed_layers(config):
    if not layer.dispatcher.spells_exchange:
      g, _, c = groups_of(config, layer)
      shape = (layer.num_experts, g, c, moe.expert_dim)
      rows.append(Tensor("hidden of experts_EGCF", shape, ("expert", "group", None, "mlp"), dtype))
  if any(isinstance(abstract_ffn(block), MLP | ParallelMoE) for block in different_blocks(model)):
    rows.append(Tensor("dense hidden_BLF", (b, length, model.dense_dim), ("batch", None, "mlp"), dtype))
  return list(dict.fromkeys(rows))


def layout(tensor: Tensor, mesh: AbstractMesh, axes: Axes | None = None) -> NamedSharding:
  return NamedSharding(mesh, sharding.partition_spec(axes or tensor.axes, tensor.shape, mesh.shape))


def num_bytes(tensor: Tensor, mesh: AbstractMesh, axes: Axes | None = None, dtype: Any = None) -> int:
  """Returns the bytes on each device."""
  shape = layout(tensor, mesh, axes).shard_shape(tensor.shape)
  return math.prod(shape) * jnp.dtype(dtype or tensor.dtype).itemsize


def _split(tensor: Tensor, mesh: AbstractMesh, axes: Axes | None = None) -> str:
  """Returns the mesh axes of size above 1 that split each dimension, e.g. `expert · fsdp · -`."""
  entries = (entry or () for entry in layout(tensor, mesh, axes).spec)
  names = (entry if isinstance(entry, tuple) else (entry,) for entry in entries)
  used = ("+".join(name for name in dim if mesh.shape[name] > 1) or "-" for dim in names)
  return " · ".join(used)


def _size(count: float) -> str:
  for unit in ("B", "KiB", "MiB"):
    if count < 1024:
      return f"{count:.4g} {unit}"
    count /= 1024
  return f"{count:.4g} GiB"


def _dims(shape: Iterable[int]) -> str:
  return " x ".join(map(str, shape))


def _logical(axes: Axes) -> str:
  return " · ".join(axis or "-" for axis in axes)


def markdown(header: list[str], rows: list[list[str]]) -> str:
  lines = [header, ["---"] * len(header), *rows]
  return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def parameter_table(tensors: list[Tensor], mesh: AbstractMesh, compute_dtype: str) -> str:
  header = ["parameter", "shape", "logical axes", "kept split over", "on each device", "used split over"]
  rows = [
    [
      tensor.name,
      _dims(tensor.shape),
      _logical(tensor.axes),
      _split(tensor, mesh),
      f"{_dims(layout(tensor, mesh).shard_shape(tensor.shape))}: {_size(num_bytes(tensor, mesh))}",
      _split(tensor, mesh, sharding.in_use(tensor.axes))
      + f": {_size(_used_bytes(tensor, mesh, compute_dtype))}",
    ]
    for tensor in tensors
  ]
  return markdown([*header[:-1], "used split over, one layer"], rows)


def _used_bytes(tensor: Tensor, mesh: AbstractMesh, compute_dtype: str) -> int:
  """Returns the bytes of one layer's part, in the dtype of its products. Norms and routers use float32."""
  compute_dtype = "float32" if {"norm", "router"} & set(tensor.axes) else compute_dtype
  layers = math.prod(size for size, axis in zip(tensor.shape, tensor.axes) if axis == "layers")
  return num_bytes(tensor, mesh, sharding.in_use(tensor.axes), compute_dtype) // layers


def activation_table(tensors: list[Tensor], mesh: AbstractMesh) -> str:
  header = ["activation of a micro-batch", "shape", "logical axes", "split over", "on each device"]
  rows = [
    [
      tensor.name,
      _dims(tensor.shape),
      _logical(tensor.axes),
      _split(tensor, mesh),
      f"{_dims(layout(tensor, mesh).shard_shape(tensor.shape))}: {_size(num_bytes(tensor, mesh))}",
    ]
    for tensor in tensors
  ]
  return markdown(header, rows)


def state_bytes(state: TrainState, mesh: AbstractMesh) -> dict[str, int]:
  """Returns the bytes of the train state on each device, by part."""
  layouts = sharding.state_shardings(mesh, state)
  size = lambda x, to: math.prod(to.shard_shape(x.shape)) * x.dtype.itemsize
  fields = {"params": "params", "opt_state": "opt_state", "balancer": "variables"}
  fields |= {"hooks": "hooks"} if state.hooks else {}
  parts = {name: (getattr(state, field), getattr(layouts, field)) for name, field in fields.items()}
  return {name: sum(jax.tree.leaves(jax.tree.map(size, *part))) for name, part in parts.items()}


def main(argv: list[str]) -> None:
  del argv
  config = cli.config_from_flags().check()
  mesh = mesh_of(config, _DEVICES.value)
  config = check_run(config, mesh)
  state = jax.eval_shape(make_init(config, _VOCAB.value), 0)
  dtype = config.model.compute_dtype
  print(" x ".join(f"{name}={size}" for name, size in mesh.shape.items()), f"= {mesh.size} devices")
  print(f"`-` is whole on every device. Parameters are kept in float32 and multiplied in {dtype}, ", end="")
  print("norms and routers in float32.\n")
  print(parameter_table(parameters(state), mesh, dtype) + "\n")
  print(activation_table(activations(config, _VOCAB.value), mesh) + "\n")
  for moe, layer in routed_layers(config):
    if layer.dispatcher.spells_exchange:
      print(
        f"--dispatcher={moe.dispatcher} keeps the rows that travel inside each device's program: docs/scaling.md.\n"
      )
  for name, count in state_bytes(state, mesh).items():
    print(f"{name}: {_size(count)} on each device")


if __name__ == "__main__":
  cli.define_flags()
  flags.adopt_module_key_flags(cli)  # shown by --help
  cli.run(main)
