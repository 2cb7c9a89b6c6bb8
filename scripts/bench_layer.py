r"""How much slower than a dense FFN of equal FLOPs is an MoE layer, forward and backward?

  python scripts/bench_layer.py
  python scripts/bench_layer.py --num_experts=64 --num_experts_per_token=8 --expert_dim=128
  python scripts/bench_layer.py --dispatchers=sorted,einsum:64,einsum:256 --capacity_factor=1.0 --json

Times value_and_grad with respect to the input and all weights, router included: router matmul, softmax,
top-k, dispatch, experts, combine. The dense FFN is a SwiGLU of hidden width K*F. Dense and MoE steps
alternate in one process, and the table gives the ratio of the minima and the median of the paired ratios.
Where these two are far from each other, the machine is busy: run again. About a minute on 2 CPU cores.
"""

import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from moe_jax.ops.dispatch import default_group_size, expert_capacity, get_dispatcher
from moe_jax.ops.experts import ExpertWeights, expert_ffn
from moe_jax.ops.routing import make_router

_TOKENS = flags.DEFINE_integer("num_tokens", 4096, "tokens in all", lower_bound=1)
_LENGTH = flags.DEFINE_integer(
  "sequence_length", 1024, "L: the default group size is chosen from it", lower_bound=1
)
_DIM = flags.DEFINE_integer("model_dim", 256, "D", lower_bound=1)
_EXPERT_DIM = flags.DEFINE_integer("expert_dim", 512, "F", lower_bound=1)
_EXPERTS = flags.DEFINE_integer("num_experts", 16, "E", lower_bound=1)
_K = flags.DEFINE_integer("num_experts_per_token", 2, "K", lower_bound=1)
_CAPACITY = flags.DEFINE_float("capacity_factor", 1.25, "slots per expert / (T*K/E); dropless has none")
_ROUTER = flags.DEFINE_string("router", "softmax_topk", "router")
_DISPATCHERS = flags.DEFINE_list(
  "dispatchers",
  ["sorted", "sorted:0", "einsum:64", "einsum", "dropless"],
  "NAME or NAME:GROUP_SIZE; 0: all tokens in one group",
)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of tokens and experts")
_PAIRS = flags.DEFINE_integer("pairs", 21, "timed pairs per dispatcher", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "of inputs and weights")
_JSON = flags.DEFINE_bool("json", False, "print one JSON object instead of the table")


def make_inputs():
  """x_TD, the output's cotangent, and parameters with fan-in initialisation."""
  d, f, e, k = _DIM.value, _EXPERT_DIM.value, _EXPERTS.value, _K.value
  keys = iter(jax.random.split(jax.random.key(_SEED.value), 16))
  dtype = jnp.dtype(_DTYPE.value)

  def normal(*shape, fan_in=1):
    return (jax.random.normal(next(keys), shape) / fan_in**0.5).astype(dtype)

  x_TD, cotangent_TD = normal(_TOKENS.value, d), normal(_TOKENS.value, d)
  dense = ExpertWeights(
    normal(1, d, k * f, fan_in=d), normal(1, d, k * f, fan_in=d), normal(1, k * f, d, fan_in=k * f)
  )
  experts = ExpertWeights(normal(e, d, f, fan_in=d), normal(e, d, f, fan_in=d), normal(e, f, d, fan_in=f))
  router_DE = normal(d, e, fan_in=d).astype(jnp.float32)
  return x_TD, cotangent_TD, dense, (router_DE, experts)


def dense_ffn(weights, x_TD):
  return expert_ffn(weights, x_TD, lambda rows, w: rows @ w[0]), {}


def moe_layer(params, x_TD, *, dispatcher, group_size):
  """The routed layer on one flat batch; also counts per expert before capacity, and drops."""
  router_DE, weights = params
  x_GTD = x_TD.reshape(-1, group_size, x_TD.shape[-1])
  logits_GTE = x_GTD.astype(jnp.float32) @ router_DE
  assignment = jax.vmap(make_router(_ROUTER.value, _EXPERTS.value, _K.value))(logits_GTE).assignment
  y_GTD, kept_GA = get_dispatcher(dispatcher)(
    x_GTD,
    assignment,
    functools.partial(expert_ffn, weights),
    num_experts=_EXPERTS.value,
    capacity=expert_capacity(group_size, _K.value, _CAPACITY.value, _EXPERTS.value),
  )
  counts_E = jnp.zeros(_EXPERTS.value).at[assignment.expert_A].add(assignment.valid_A)
  info = {
    "max_vio": counts_E.max() / counts_E.mean() - 1,
    "dropped": 1 - kept_GA.sum() / assignment.valid_A.sum(),
  }
  return y_GTD.reshape(x_TD.shape), info


def train_step(layer, cotangent_TD):
  """jitted (params, x) -> ((loss, info), gradients of both)."""

  def loss(params, x_TD):
    y_TD, info = layer(params, x_TD)
    return jnp.vdot(y_TD.astype(jnp.float32), cotangent_TD.astype(jnp.float32)), info

  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def seconds(step, *args):
  start = time.perf_counter()
  jax.block_until_ready(step(*args))
  return time.perf_counter() - start


def compare(spec, inputs):
  """One row of the table: a dispatcher against the dense FFN, alternating."""
  x_TD, cotangent_TD, dense_params, moe_params = inputs
  name, _, size = spec.partition(":")
  group_size = int(size) if size else default_group_size(name, min(_LENGTH.value, _TOKENS.value))
  group_size = group_size or _TOKENS.value
  if _TOKENS.value % group_size:
    raise app.UsageError(
      f"--dispatchers={spec}: groups of {group_size} do not divide --num_tokens={_TOKENS.value}"
    )
  dense_step = train_step(dense_ffn, cotangent_TD)
  step = train_step(functools.partial(moe_layer, dispatcher=name, group_size=group_size), cotangent_TD)
  jax.block_until_ready(dense_step(dense_params, x_TD))
  (_, info), _ = jax.block_until_ready(step(moe_params, x_TD))
  pairs = [
    (seconds(dense_step, dense_params, x_TD), seconds(step, moe_params, x_TD)) for _ in range(_PAIRS.value)
  ]
  dense_s, moe_s = np.array(pairs).T
  return {
    "dispatcher": name,
    "group_size": group_size,
    "ratio_min": moe_s.min() / dense_s.min(),
    "ratio_median": float(np.median(moe_s / dense_s)),
    "dense_ms": dense_s.min() * 1e3,
    "moe_ms": moe_s.min() * 1e3,
    "max_vio": float(info["max_vio"]),
    "dropped": float(info["dropped"]),
  }


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  logging.set_verbosity(logging.WARNING)  # JAX tells which backends it does not find
  inputs = make_inputs()
  rows = [compare(spec, inputs) for spec in _DISPATCHERS.value]
  shape = {
    flag.name: flag.value for flag in (_TOKENS, _DIM, _EXPERT_DIM, _EXPERTS, _K, _CAPACITY, _ROUTER, _DTYPE)
  }
  device = f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
  if _JSON.value:
    print(json.dumps({"shape": shape, "device": device, "rows": rows}))
    return
  print("  ".join(f"{name}={value}" for name, value in shape.items()), f" on {device}")
  print(
    f"dense: SwiGLU of hidden width K*F={_K.value * _EXPERT_DIM.value}. Routing is real: a random router on"
  )
  print("random inputs chooses; max_vio = max(load)/mean(load)-1 over all tokens, before capacity.\n")
  print("dispatcher  group  ratio_median  ratio_min  dense_ms   moe_ms  max_vio  dropped")
  for r in rows:
    print(
      f"{r['dispatcher']:<10} {r['group_size']:>6} {r['ratio_median']:>13.2f} {r['ratio_min']:>10.2f}"
      f" {r['dense_ms']:>9.1f} {r['moe_ms']:>8.1f} {r['max_vio']:>8.2f} {r['dropped']:>8.3f}"
    )


if __name__ == "__main__":
  app.run(main)
