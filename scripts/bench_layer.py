r"""Compares the time of an MoE layer, forward and backward, with that of a dense FFN of equal FLOPs.

  python scripts/bench_layer.py
  python scripts/bench_layer.py --num_experts=64 --num_experts_per_token=8 --expert_dim=128
  python scripts/bench_layer.py --dispatchers=sorted,einsum:64,einsum:256 --capacity_factor=1.0 --json
  python scripts/bench_layer.py --balancing=all     # each method's layer against the one with plain top-k
  python scripts/bench_layer.py --routers=all
  python scripts/bench_layer.py --routers=my_router --plugins=my_router.py

The script times value_and_grad with respect to the input and all weights, including the router: router matmul,
softmax, top-k, dispatch, experts, combine. The dense FFN is a SwiGLU of hidden width K*F. Dense and MoE steps
alternate in one process. The table gives the ratio of the minima and the median of the paired ratios. If the two
differ a lot, the machine is busy: run again. It takes about a minute on 2 CPU cores, and ten seconds per method
with --balancing or --routers.
"""

import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from flax import nnx

from moe_jax import cli
from moe_jax.comparison.arms import arms_from_flag, balancing, balancing_arm, routers, routing_arm, with_arm
from moe_jax.config import Config, ModelConfig, MoEConfig
from moe_jax.errors import InputError
from moe_jax.nn.aux import update_balancers
from moe_jax.nn.build import different_blocks, resolve
from moe_jax.nn.context import Context
from moe_jax.nn.variables import BalancerState
from moe_jax.ops.dispatch import default_group_size, expert_capacity, no_sharding
from moe_jax.ops.experts import gated_experts, swiglu
from moe_jax.ops.routing import make_choice
from moe_jax.ops.routing.common import in_groups
from moe_jax.sharding import constrain, on_one_cpu
from moe_jax.sharding.dispatchers import make_dispatcher
from moe_jax.types import RouterContext

_TOKENS = flags.DEFINE_integer("num_tokens", 4096, "total number of tokens", lower_bound=1)
_LENGTH = flags.DEFINE_integer(
  "sequence_length", 1024, "L, which determines the default group size", lower_bound=1
)
_DIM = flags.DEFINE_integer("model_dim", 256, "D", lower_bound=1)
_EXPERT_DIM = flags.DEFINE_integer("expert_dim", 512, "F", lower_bound=1)
_EXPERTS = flags.DEFINE_integer("num_experts", 16, "E", lower_bound=1)
_K = flags.DEFINE_integer("num_experts_per_token", 2, "K", lower_bound=1)
_CAPACITY = flags.DEFINE_float("capacity_factor", 1.25, "slots per expert / (T*K/E); dropless ignores it")
_ROUTER = flags.DEFINE_string(
  "router", "softmax_topk", "the choice from random logits; routers with parameters: --routers"
)
_DISPATCHERS = flags.DEFINE_list(
  "dispatchers",
  ["sorted", "buffers", "einsum:64", "einsum", "dropless"],
  "NAME or NAME:GROUP_SIZE (0: all tokens in one group); buffers is sorted in its form for several devices",
)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "dtype of tokens and experts")
_PAIRS = flags.DEFINE_integer("pairs", 21, "number of timed pairs per dispatcher", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "seed of inputs and weights")
_BALANCING = flags.DEFINE_string(
  "balancing", "", "all, or arms as in experiments/load_balancing.py --methods"
)
_ROUTERS = flags.DEFINE_string("routers", "", "all, or arms as in experiments/routers.py --routers")
flags.DEFINE_list("plugins", [], "Python files or modules that register methods of your own")
_JSON = flags.DEFINE_bool("json", False, "print one JSON object instead of the table")


def make_inputs():
  """Returns x_TD, the output's cotangent, and the dense and MoE parameters, initialised by fan-in."""
  d, f, e, k = _DIM.value, _EXPERT_DIM.value, _EXPERTS.value, _K.value
  keys = iter(jax.random.split(jax.random.key(_SEED.value), 16))
  dtype = jnp.dtype(_DTYPE.value)

  def normal(*shape, fan_in=1):
    return (jax.random.normal(next(keys), shape) / fan_in**0.5).astype(dtype)

  x_TD, cotangent_TD = normal(_TOKENS.value, d), normal(_TOKENS.value, d)
  dense = normal(d, k * f, fan_in=d), normal(d, k * f, fan_in=d), normal(k * f, d, fan_in=k * f)
  experts = gated_experts(normal(e, d, f, fan_in=d), normal(e, d, f, fan_in=d), normal(e, f, d, fan_in=f))
  router_DE = normal(d, e, fan_in=d).astype(jnp.float32)
  return x_TD, cotangent_TD, dense, (router_DE, experts)


def dense_ffn(weights, x_TD):
  gate_DF, up_DF, down_FD = weights
  return swiglu(x_TD @ gate_DF, x_TD @ up_DF) @ down_FD, {}


def dispatcher_of(name):
  return make_dispatcher("sorted" if name == "buffers" else name)


def moe_layer(params, x_TD, *, dispatcher, group_size):
  """Applies the routed layer to one flat batch. Also returns MaxVio before capacity, and the dropped fraction."""
  router_DE, experts = params
  x_GTD = x_TD.reshape(-1, group_size, x_TD.shape[-1])
  logits_GTE = x_GTD.astype(jnp.float32) @ router_DE
  choice = make_choice(_ROUTER.value, _EXPERTS.value, _K.value)
  context = RouterContext(jnp.ones(x_GTD.shape[:2], bool))
  assignment = in_groups(choice.choose, logits_GTE, context=context).assignment
  one_cpu = on_one_cpu() and dispatcher != "buffers"
  y_GTD, kept_GA = dispatcher_of(dispatcher).dispatch(
    x_GTD,
    assignment,
    experts,
    num_experts=_EXPERTS.value,
    capacity=expert_capacity(group_size, _K.value, _CAPACITY.value, _EXPERTS.value),
    shard=no_sharding if one_cpu else constrain,
  )
  counts_E = jnp.zeros(_EXPERTS.value).at[assignment.expert_A].add(assignment.valid_A)
  info = {
    "max_vio": counts_E.max() / counts_E.mean() - 1,
    "dropped": 1 - kept_GA.sum() / assignment.valid_A.sum(),
  }
  return y_GTD.reshape(x_TD.shape), info


def train_step(layer, cotangent_TD):
  """Returns a jitted (params, x) -> ((loss, info), gradients of both)."""

  def loss(params, x_TD):
    y_TD, info = layer(params, x_TD)
    return jnp.vdot(y_TD.astype(jnp.float32), cotangent_TD.astype(jnp.float32)), info

  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def seconds(step, *args):
  start = time.perf_counter()
  jax.block_until_ready(step(*args))
  return time.perf_counter() - start


def ratios(base, other):
  """Runs `base` and `other`, functions without arguments, alternately. Returns ratios and milliseconds."""
  jax.block_until_ready((base(), other()))
  pairs = np.array([(seconds(base), seconds(other)) for _ in range(_PAIRS.value)])
  base_s, other_s = pairs.T
  return {
    "ratio_min": other_s.min() / base_s.min(),
    "ratio_median": float(np.median(other_s / base_s)),
    "base_ms": base_s.min() * 1e3,
    "ms": other_s.min() * 1e3,
  }


def compare(spec, inputs):
  """Returns one row of the table: a dispatcher compared with the dense FFN."""
  x_TD, cotangent_TD, dense_params, moe_params = inputs
  name, _, size = spec.partition(":")
  group_size = (
    int(size)
    if size
    else default_group_size(dispatcher_of(name).small_groups, min(_LENGTH.value, _TOKENS.value))
  )
  group_size = group_size or _TOKENS.value
  if _TOKENS.value % group_size:
    raise InputError(
      f"--dispatchers={spec}: groups of {group_size} do not divide --num_tokens={_TOKENS.value}"
    )
  dense_step = train_step(dense_ffn, cotangent_TD)
  step = train_step(functools.partial(moe_layer, dispatcher=name, group_size=group_size), cotangent_TD)
  (_, info), _ = step(moe_params, x_TD)
  return {
    "name": f"{name}:{group_size}",
    **ratios(lambda: dense_step(dense_params, x_TD), lambda: step(moe_params, x_TD)),
    "max_vio": float(info["max_vio"]),
    "dropped": float(info["dropped"]),
  }


def method_step(model, inputs):
  """Returns a function that computes gradients and the updated balancer state of the feed-forward part of `model`."""
  x_TD, cotangent_TD, _, _ = inputs
  length = min(_LENGTH.value, _TOKENS.value)
  x_BLD, cotangent_BLD = (x.reshape(-1, length, x.shape[-1]) for x in (x_TD, cotangent_TD))
  batch = x_BLD.shape[0]
  (block,) = different_blocks(resolve(model))
  sizes = {"dim": _DIM.value, "dense_dim": model.dense_dim, "activation": model.activation, "init_scale": 1.0}
  layer = block.ffn(moe=block.moe, rngs=nnx.Rngs(_SEED.value), **sizes)
  graphdef, params, variables = nnx.split(layer, nnx.Param, ...)
  context = Context(
    key_B=jax.random.split(jax.random.key(_SEED.value), batch),
    token_id_BL=jax.random.randint(jax.random.key(1), (batch, length), 0, 256),
    domain_B=jnp.arange(batch) % 4,
    num_domains=4,
    train=True,
  )

  def loss(params, x_BLD, variables):
    y_BLD, aux = nnx.merge(graphdef, params, variables)(x_BLD, context)
    total = jnp.vdot(y_BLD.astype(jnp.float32), cotangent_BLD.astype(jnp.float32))
    return total + sum(aux.losses.values()), aux

  @jax.jit
  def step(params, x_BLD, variables):
    gradients, aux = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x_BLD, variables)
    layer = nnx.merge(graphdef, params, variables)
    update_balancers(layer, aux)
    return gradients, nnx.state(layer, BalancerState), aux.tokens_per_expert_BE

  return lambda: step(params, x_BLD, variables)


def compare_method(name, step, base_step):
  """Returns one row: the layer with an arm's methods compared with plain top-k without balancing."""
  counts_E = np.asarray(step()[2]).sum(axis=0)
  return {
    "name": name,
    **ratios(base_step, step),
    "max_vio": float(counts_E.max() / max(counts_E.mean(), 1e-9) - 1),
    "dropped": float("nan"),
  }


def method_rows(inputs):
  """Yields each row when it has been measured."""
  moe = MoEConfig(
    num_experts=_EXPERTS.value,
    num_experts_per_token=_K.value,
    expert_dim=_EXPERT_DIM.value,
    capacity_factor=_CAPACITY.value,
  )
  base = Config(model=ModelConfig(model_dim=_DIM.value, moe=moe))
  found = (
    arms_from_flag("balancing", _BALANCING.value, balancing(base), balancing_arm) if _BALANCING.value else {}
  )
  if _ROUTERS.value:
    found |= arms_from_flag("routers", _ROUTERS.value, routers(moe), routing_arm)
  base_step = method_step(base.model, inputs)
  for name, arm in found.items():
    yield compare_method(name, method_step(with_arm(base, arm).model, inputs), base_step)


def print_table(rows, width):
  """Prints each row as soon as it is measured."""
  print(f"{'':<{width}}  ratio_median  ratio_min  base_ms       ms  max_vio  dropped", flush=True)
  for r in rows:
    print(
      f"{r['name']:<{width}} {r['ratio_median']:>13.2f} {r['ratio_min']:>10.2f}"
      f" {r['base_ms']:>8.1f} {r['ms']:>8.1f} {r['max_vio']:>8.2f} {r['dropped']:>8.3f}",
      flush=True,
    )


def main(argv):
  del argv
  logging.set_verbosity(logging.WARNING)  # otherwise JAX logs which backends it does not find
  MoEConfig(  # which checks them
    num_experts=_EXPERTS.value,
    num_experts_per_token=_K.value,
    expert_dim=_EXPERT_DIM.value,
    capacity_factor=_CAPACITY.value,
  ).check()
  for spec in _DISPATCHERS.value:
    name, colon, size = spec.partition(":")
    dispatcher_of(name)
    if colon and not size.isdecimal():
      raise InputError(f"--dispatchers={spec}: must be NAME or NAME:GROUP_SIZE, with a whole number")
  inputs = make_inputs()
  methods = bool(_BALANCING.value or _ROUTERS.value)
  rows = method_rows(inputs) if methods else (compare(spec, inputs) for spec in _DISPATCHERS.value)
  shape = {
    flag.name: flag.value for flag in (_TOKENS, _DIM, _EXPERT_DIM, _EXPERTS, _K, _CAPACITY, _ROUTER, _DTYPE)
  }
  device = f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
  if _JSON.value:
    print(json.dumps({"shape": shape, "device": device, "rows": list(rows)}))
    return
  print("  ".join(f"{name}={value}" for name, value in shape.items()), f" on {device}")
  if methods:
    print(
      "base: the same layer with softmax_topk and no balancing. max_vio is over all tokens, at initialisation.\n"
    )
  else:
    print(
      f"base: a dense SwiGLU of hidden width K*F={_K.value * _EXPERT_DIM.value}. A random router chooses experts for"
    )
    print("random inputs. max_vio = max(load)/mean(load)-1 over all tokens, before capacity.\n")
  print_table(rows, 38 if methods else 14)


if __name__ == "__main__":
  cli.run(main)
