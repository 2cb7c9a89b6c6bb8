r"""Measures whether a TPU program overlaps its exchanges with computation, and what the chunks of an exchange cost.

  python scripts/exchange_overlap.py
  python scripts/exchange_overlap.py --topology=v5p:2x2x4 --expert_parallelism=16 --chunks=1,4 --forward

The script compiles the dispatcher with its experts, forward and backward, for a TPU topology. It needs no TPU, only
the compiler (pip install -e '.[tpu]'). For each number of chunks, it prints the exchanges of rows, how many of them the
schedule starts before a matrix product and ends after it, the temporary memory of a chip, and the compiler's FLOPs
divided by the model's. The compiler counts the whole receive buffer, which `dropless:buffer_factor=1.25` bounds, even
if the kernel multiplies only the rows that arrived. It takes two minutes on 2 CPU cores.
"""

import dataclasses
import time

import jax
import jax.numpy as jnp
from absl import flags

from moe_jax import cli, sharding
from moe_jax.analysis.hlo import parse
from moe_jax.analysis.overlap import exchanges
from moe_jax.analysis.topology import devices_of
from moe_jax.config import MeshConfig
from moe_jax.errors import InputError
from moe_jax.ops.experts import gated_experts
from moe_jax.sharding.dispatchers import Dispatcher, make_dispatcher
from moe_jax.types import Assignment

_TOPOLOGY = flags.DEFINE_string("topology", "v5p:2x2x2", "TPU generation and grid of chips")
_EXPERT_PARALLELISM = flags.DEFINE_integer(
  "expert_parallelism", 8, "devices that share the experts", lower_bound=2
)
_CHUNKS = flags.DEFINE_list("chunks", ["1", "2", "4"], "numbers of chunks to compile with")
_DISPATCHER = flags.DEFINE_string("dispatcher", "dropless", "dropless or all_to_all, with options but chunks")
_EXPERTS = flags.DEFINE_integer("num_experts", 64, "E", lower_bound=1)
_K = flags.DEFINE_integer("num_experts_per_token", 2, "K", lower_bound=1)
_DIM = flags.DEFINE_integer("model_dim", 1024, "D", lower_bound=1)
_HIDDEN = flags.DEFINE_integer("expert_dim", 2048, "F", lower_bound=1)
_GROUPS = flags.DEFINE_integer("groups", 4, "routing groups on each chip", lower_bound=1)
_LENGTH = flags.DEFINE_integer("group_size", 1024, "tokens of a group", lower_bound=1)
_FORWARD = flags.DEFINE_bool("forward", False, "leave the backward pass out")


def dispatchers() -> dict[str, Dispatcher]:
  """Returns the dispatchers by number of chunks. Raises `InputError` for an invalid flag, before compiling anything."""
  spec = _DISPATCHER.value
  if spec.partition(":")[0] not in ("dropless", "all_to_all") or "chunks=" in spec:
    raise InputError(f"--dispatcher={spec}: dropless or all_to_all; the number of chunks is --chunks")
  if _EXPERTS.value % _EXPERT_PARALLELISM.value:
    raise InputError(
      f"--num_experts={_EXPERTS.value}: must be a multiple of --expert_parallelism={_EXPERT_PARALLELISM.value}"
    )
  return {chunks: make_dispatcher(f"{spec}:chunks={chunks}") for chunks in _CHUNKS.value}


def arguments(mesh):
  """Returns shapes and layouts of x_GTD, the assignment and the experts."""

  def array(shape, dtype, *axes):
    layout = jax.sharding.NamedSharding(mesh, sharding.partition_spec(axes))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=layout)

  g, t, d, e, f = mesh.size * _GROUPS.value, _LENGTH.value, _DIM.value, _EXPERTS.value, _HIDDEN.value
  entries = lambda dtype: array((g, t * _K.value), dtype, "group", None)
  shapes = (e, d, f), (e, d, f), (e, f, d)
  experts = gated_experts(*(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes))
  laid_out = (array(w.shape, w.dtype, *axes) for w, axes in zip(experts.weights, experts.axes, strict=True))
  experts = dataclasses.replace(experts, weights=tuple(laid_out))
  fields = entries(jnp.int32), entries(jnp.int32), entries(jnp.float32), entries(bool)
  return array((g, t, d), jnp.bfloat16, "group", None, None), Assignment(*fields), experts


def compile_with(dispatcher: Dispatcher, mesh):
  """Returns the compiled program and the compile time in seconds."""
  capacity = -(-_LENGTH.value * _K.value // _EXPERTS.value)

  def run(x, assignment, experts, d_y):
    def forward(x, combine, experts):
      given = assignment._replace(weight_A=combine)
      return dispatcher.dispatch(
        x, given, experts, num_experts=_EXPERTS.value, capacity=capacity, shard=sharding.constrain
      )[0]

    if _FORWARD.value:
      return forward(x, assignment.weight_A, experts)
    y, pullback = jax.vjp(forward, x, assignment.weight_A, experts)
    return y, pullback(d_y)

  x, assignment, experts = arguments(mesh)
  start = time.time()
  with jax.set_mesh(mesh):
    compiled = jax.jit(run).lower(x, assignment, experts, x).compile()
  return compiled, time.time() - start


def model_flops() -> int:
  """Returns the operations of one chip: three matrices per entry, and twice as many again in the backward pass."""
  forward = 6 * _GROUPS.value * _LENGTH.value * _K.value * _DIM.value * _HIDDEN.value
  return forward if _FORWARD.value else 3 * forward


def main(argv):
  del argv
  asked = dispatchers()
  mesh = sharding.make_mesh(
    MeshConfig(data=-1, expert=_EXPERT_PARALLELISM.value), devices_of(_TOPOLOGY.value)
  )
  print(f"{_DISPATCHER.value} on {_TOPOLOGY.value}, jax {jax.__version__}, mesh {dict(mesh.shape)}")
  print(
    "chunks  exchanges  waiting  enclosing products  products enclosed  temporary MiB  FLOPs/model's  seconds"
  )
  for chunks, dispatcher in asked.items():
    compiled, seconds = compile_with(dispatcher, mesh)
    found = exchanges(parse(compiled.as_text()))
    enclosing = [exchange.products for exchange in found if exchange.products]
    memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
    flops = compiled.cost_analysis()["flops"] / model_flops()
    print(
      f"{chunks:>6} {len(found):>10} {sum(e.waits for e in found):>8} "
      f"{len(enclosing):>19} {sum(enclosing):>18} "
      f"{memory:>14.0f} {flops:>14.2f} {seconds:>10.0f}"
    )


if __name__ == "__main__":
  cli.run(main)
