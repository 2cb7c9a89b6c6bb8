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
from moe_jax.config import Config
from moe_jax.nn.methods import group_size, layer_kind, num_scored_experts
from moe_jax.ops.dispatch import expert_capacity
from moe_jax.ops.dispatch.common import BY_EXPERT, BY_GROUP
from moe_jax.sharding.dispatchers import get_dispatcher
from moe_jax.training.compiled import check_run
from moe_jax.training.step import TrainState, init_state

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
  """Returns one row per kind of parameter. Parameters of stacked layers have the axis `layers` in front."""
  found = []
  for path, variable in nnx.to_flat_state(state.params):
    shape, axes = variable.get_value().shape, variable.get_metadata()["logical_axes"]
    name = ".".join(str(part) for part in path if part not in ("periods", "sparse"))
    found.append(Tensor(name, shape, ("layers",) * (len(shape) - len(axes)) + axes, jnp.float32))
  return found


def activations(config: Config, vocab_size: int) -> list[Tensor]:
  """Returns the activations of one training micro-batch. The code constrains the first ones; XLA derives the others."""
  return constrained(config) + derived(config, vocab_size)


def constrained(config: Config) -> list[Tensor]:
  model, moe, length = config.model, config.model.moe, config.data.sequence_length
  b, d, e = config.data.batch_size // config.train.accumulation, model.model_dim, moe.num_experts
  t, dtype = group_size(moe, length), jnp.dtype(model.compute_dtype)
  g, c = b * length // t, expert_capacity(t, moe.num_experts_per_token, moe.capacity_factor, e)
  rows = [Tensor("x_BLD", (b, length, d), ("batch", None, None), dtype)]
  if not layer_kind(moe).routes:
    return rows
  rows += [
    Tensor("x_GTD, y_GTD", (g, t, d), ("group", None, None), dtype),
    Tensor("router logits_GTE", (g, t, num_scored_experts(moe)), ("group", None, None), jnp.float32),
  ]
  if get_dispatcher(moe.dispatcher).spells_exchange:
    return rows
  return [
    *rows,
    Tensor("slots by group_GECD", (g, e, c, d), BY_GROUP, dtype),
    Tensor("slots by expert_EGCD", (e, g, c, d), BY_EXPERT, dtype),
  ]


def derived(config: Config, vocab_size: int) -> list[Tensor]:
  model, moe, length = config.model, config.model.moe, config.data.sequence_length
  b, n, x, h = (
    config.data.batch_size // config.train.accumulation,
    model.num_heads,
    model.num_kv_heads,
    model.head_dim,
  )
  t, dtype = group_size(moe, length), jnp.dtype(model.compute_dtype)
  g, c = b * length // t, expert_capacity(t, moe.num_experts_per_token, moe.capacity_factor, moe.num_experts)
  rows = [
    Tensor("query, mixed_BLNH", (b, length, n, h), ("batch", None, "heads", None), dtype),
    Tensor("key, value_BLNH", (b, length, x, h), ("batch", None, "kv_heads", None), dtype),
    Tensor("logits_BLV", (b, length, vocab_size), ("batch", None, "vocab"), jnp.float32),
  ]
  if layer_kind(moe).routes and not get_dispatcher(moe.dispatcher).spells_exchange:
    axes = ("expert", "group", None, "mlp")
    rows.append(Tensor("hidden of experts_EGCF", (moe.num_experts, g, c, moe.expert_dim), axes, dtype))
  if model.num_dense_first or model.moe_every > 1:
    rows.append(Tensor("dense hidden_BLF", (b, length, model.dense_dim), ("batch", None, "mlp"), dtype))
  return rows


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
  parts = {
    name: (getattr(state, name), getattr(layouts, name)) for name in ("params", "opt_state", "balancer")
  }
  return {name: sum(jax.tree.leaves(jax.tree.map(size, *part))) for name, part in parts.items()}


def main(argv: list[str]) -> None:
  del argv
  config = cli.config_from_flags().check()
  mesh = mesh_of(config, _DEVICES.value)
  check_run(config, mesh)
  state = jax.eval_shape(lambda: init_state(config, _VOCAB.value, 0))
  moe, dtype = config.model.moe, config.model.compute_dtype
  print(" x ".join(f"{name}={size}" for name, size in mesh.shape.items()), f"= {mesh.size} devices")
  print(f"`-` is whole on every device. Parameters are kept in float32 and multiplied in {dtype}, ", end="")
  print("norms and routers in float32.\n")
  print(parameter_table(parameters(state), mesh, dtype) + "\n")
  print(activation_table(activations(config, _VOCAB.value), mesh) + "\n")
  if get_dispatcher(moe.dispatcher).spells_exchange:
    print(
      f"--dispatcher={moe.dispatcher} keeps the rows that travel inside each device's program: docs/scaling.md.\n"
    )
  for name, count in state_bytes(state, mesh).items():
    print(f"{name}: {_size(count)} on each device")


if __name__ == "__main__":
  cli.define_flags()
  cli.run(main)
