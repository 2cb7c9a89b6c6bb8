r"""Checks whether this GPU computes correct values, and measures how fast each dispatcher is on it.

  python scripts/gpu_check.py
  python scripts/gpu_check.py --dispatchers=dropless,all_to_all --num_experts=128 --batch_size=16
  python scripts/gpu_check.py --compute_dtype=float32 --json
  python scripts/gpu_check.py --preset=tiny --platform=cpu --matmul_size=256

Values: the script compares one layer with every expert on every token, and one training step with the same step using
capacity buffers, both in float32 with full-precision products, on few tokens without drops. Speed: it times the layer
(forward and backward) and the training step with AdamW, relative to the operations that the model needs and to the
fastest of several plain matrix products of the same type in the same run. Without --preset, sizes are those of
Qwen3-30B-A3B with two layers and half of its experts. It uses the first GPU, and needs neither grain nor TFDS. The exit
status is 1 if a value is wrong. Without a GPU, the script says so and exits with 0.
"""

import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import flags
from flax import nnx

from moe_jax import Context, cli, sharding
from moe_jax.analysis.flops import forward_flops, step_flops
from moe_jax.config import Config, DataConfig, MeshConfig, MoEConfig, OptimizerConfig, TrainConfig
from moe_jax.nn.ffn import FFNS
from moe_jax.ops.routing import make_choice
from moe_jax.sharding.dispatchers import make_dispatcher
from moe_jax.training.compiled import CompiledSteps, check_run, compile_steps
from moe_jax.training.results import versions
from moe_jax.types import RouterContext

_DISPATCHERS = flags.DEFINE_list("dispatchers", ["einsum", "sorted", "dropless"], "what to check and time")
_PLATFORM = flags.DEFINE_string("platform", "gpu", "use cpu to try the script without a GPU")
_VOCAB = flags.DEFINE_integer("vocab_size", 8192, "V", lower_bound=1)
_CHECK_LENGTH = flags.DEFINE_integer("check_length", 128, "L for checking values; B is 2", lower_bound=1)
_MATMUL = flags.DEFINE_integer(
  "matmul_size", 8192, "n of the largest n x n product that measures the ceiling", lower_bound=4
)
_REPEATS = flags.DEFINE_integer("repeats", 20, "timed runs; their median is reported", lower_bound=1)
_JSON = flags.DEFINE_bool("json", False, "print one JSON object instead of the tables")
_OTHERS = (DataConfig, TrainConfig, OptimizerConfig)  # this script uses only two of their fields
cli.define_flags(
  leave_out={"dispatcher", *(f"{axis}_parallelism" for axis in sharding.MESH_AXES)}
  | {field.name for part in _OTHERS for field in dataclasses.fields(part)} - {"batch_size", "sequence_length"}
)
flags.adopt_module_key_flags(cli)  # shown by --help

# Sizes if neither --preset nor the flag is given.
SIZES = {
  "moe": {"num_experts": 64, "num_experts_per_token": 8, "expert_dim": 768},
  "model": {"num_layers": 2, "model_dim": 2048, "num_heads": 16, "num_kv_heads": 4, "head_dim": 128,
            "compute_dtype": "bfloat16", "remat": "none"},
  "data": {"batch_size": 8, "sequence_length": 2048},
}  # fmt: skip

# The largest allowed error |value - right| / |right|, with Euclidean norms over a whole array. bfloat16 rounds a number
# by up to 2**-9 of its value. TF32, in which GPUs may multiply float32, rounds by up to 2**-11. A value goes through
# four to eight such roundings, and a gradient through twice as many. In the training step, rounding also sends a few
# tokens to another expert. This is not an arithmetic error, so the bound for the step is wider.
TOLERANCE = {
  "bfloat16": {"y": 0.012, "gradients": 0.025, "loss": 0.01, "step_gradients": 0.25},
  "float32": {"y": 0.003, "gradients": 0.006, "loss": 0.0025, "step_gradients": 0.05},
}


# What the script runs


def given_config() -> Config:
  """Returns the flags' configuration, without clipping: Adam's first moment is then (1 - beta1) times the gradient."""
  config = cli.config_from_flags()
  unsaid = {} if flags.FLAGS.preset != "default" else SIZES
  not_given = lambda fields: {k: v for k, v in fields.items() if not flags.FLAGS[k].present}
  new = {part: not_given(fields) for part, fields in unsaid.items()}
  moe = dataclasses.replace(config.model.moe, **new.get("moe", {}))
  return dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, moe=moe, **new.get("model", {})),
    data=dataclasses.replace(config.data, **new.get("data", {})),
    train=TrainConfig(num_steps=100, tensorboard=False),
    optimizer=OptimizerConfig(clip_norm=0.0),
    mesh=MeshConfig(data=1),
  ).check()


def change(config: Config, dispatcher: str, dtype: str = "") -> Config:
  """Returns `config` with another dispatcher. With `dtype`, also for checking values: few tokens, and no drops."""
  model, data, moe = config.model, config.data, dataclasses.replace(config.model.moe, dispatcher=dispatcher)
  if dtype:
    moe = dataclasses.replace(moe, capacity_factor=moe.num_experts / moe.num_experts_per_token, jitter=0.0)
    data = dataclasses.replace(
      data, batch_size=2, sequence_length=min(_CHECK_LENGTH.value, data.sequence_length)
    )
  model = dataclasses.replace(model, moe=moe, compute_dtype=dtype or model.compute_dtype)
  return dataclasses.replace(config, model=model, data=data)


def only_routed(moe: MoEConfig) -> MoEConfig:
  """Returns the part of the layer that is compared, without anything that a preset adds."""
  plain = {"router": "softmax_topk", "balancers": "none", "experts": "swiglu"}
  return dataclasses.replace(moe, num_shared_experts=0, group_size=0, **plain)


def make_batch(config: Config) -> dict[str, jax.Array]:
  """Returns a batch of random tokens on the mesh in use."""
  batch, length = config.data.batch_size, config.data.sequence_length
  window = jax.random.randint(jax.random.key(2), (batch, length + 1), 0, _VOCAB.value, jnp.int32)
  return {
    "tokens_BL": window[:, :-1],
    "targets_BL": window[:, 1:],
    "mask_BL": jnp.ones((batch, length), bool),
    "domain_B": jnp.zeros(batch, jnp.int32),
  }


def random_tokens(config: Config) -> tuple[jax.Array, jax.Array]:
  """Returns x_BLD in the compute dtype, and cotangent_BLD in float32 with values that this dtype can represent."""
  shape = config.data.batch_size, config.data.sequence_length, config.model.model_dim
  draw = lambda key: jax.random.normal(key, shape).astype(config.model.compute_dtype)
  x_BLD, cotangent_BLD = map(draw, jax.random.split(jax.random.key(1)))
  return x_BLD, cotangent_BLD.astype(jnp.float32)


def make_layer(config: Config) -> tuple[Any, Callable]:
  """Returns parameters, and a jitted (parameters, x_BLD, cotangent_BLD) -> (gradients of parameters and x, y_BLD)."""
  layer = FFNS["moe"](only_routed(config.model.moe), config.model.model_dim, "swiglu", 1.0, nnx.Rngs(0))
  graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
  # Values that the compute dtype can represent, so that the right result does not depend on this dtype.
  params = jax.tree.map(lambda w: w.astype(config.model.compute_dtype).astype(jnp.float32), params)

  def loss(params, x_BLD, cotangent_BLD):
    y_BLD, _ = nnx.merge(graphdef, params, rest)(x_BLD, Context(train=True))
    return jnp.vdot(y_BLD.astype(jnp.float32), cotangent_BLD), y_BLD

  return params, jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))


# Values


def every_expert(moe: MoEConfig, params: Any, x_TD: jax.Array) -> jax.Array:
  """The definition of the layer: each expert on every token, times its weight, which is 0 if it was not chosen."""
  choice = make_choice("softmax_topk", moe.num_experts, moe.num_experts_per_token)
  logits_TE = x_TD @ params["router"]["w_router_DE"][...]
  chosen = choice.choose(logits_TE, RouterContext(jnp.ones(x_TD.shape[0], bool))).assignment
  weight_TE = jnp.zeros((x_TD.shape[0], moe.num_experts))
  weight_TE = weight_TE.at[chosen.token_A, chosen.expert_A].add(chosen.weight_A)

  def add(y_TD, expert):
    weight_T, gate_DF, up_DF, down_FD = expert
    hidden_TF = jax.nn.silu(x_TD @ gate_DF) * (x_TD @ up_DF)
    return y_TD + weight_T[:, None] * (hidden_TF @ down_FD), None

  matrices = (params["experts"][name][...] for name in ("w_gate_EDF", "w_up_EDF", "w_down_EFD"))
  return jax.lax.scan(add, jnp.zeros_like(x_TD), (weight_TE.T, *matrices))[0]


def error(value: Any, right: Any) -> float:
  """Returns |value - right| / |right| over all arrays of two trees together."""
  norm = lambda tree: (
    float(sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree))) ** 0.5
  )
  difference = jax.tree.map(lambda a, b: a.astype(jnp.float32) - b.astype(jnp.float32), value, right)
  return norm(difference) / max(norm(right), 1e-30)


def check_layer(config: Config, dispatchers: list[str]) -> dict[str, dict[str, float]]:
  """Returns the errors of y and of the worst gradient (of x, router and experts), for each dispatcher."""
  dtype = config.model.compute_dtype
  configs = {name: change(config, name, dtype) for name in dispatchers}
  first = change(config, "sorted", dtype)
  x_BLD, cotangent_BLD = random_tokens(first)
  params, _ = make_layer(first)

  def right(params, x_BLD):
    y_TD = every_expert(first.model.moe, params, x_BLD.reshape(-1, x_BLD.shape[-1]))
    return jnp.vdot(y_TD.reshape(x_BLD.shape), cotangent_BLD), y_TD.reshape(x_BLD.shape)

  with jax.default_matmul_precision("highest"):
    run = jax.jit(jax.grad(right, argnums=(0, 1), has_aux=True))
    gradients, y_BLD = run(params, x_BLD.astype(jnp.float32))
  found = {}
  for name, changed in configs.items():
    _, run = make_layer(changed)
    ours, y = run(params, x_BLD, cotangent_BLD)
    each = map(error, jax.tree.leaves(ours), jax.tree.leaves(gradients))
    found[name] = {"y": error(y, y_BLD), "gradients": max(each)}
  return found


def compiled(config: Config) -> CompiledSteps:
  mesh = sharding.make_mesh(config.mesh, [jax.config.jax_default_device])
  return compile_steps(config, _VOCAB.value, 1, mesh)


def check_step(config: Config, dispatchers: list[str], init: Callable) -> dict[str, dict[str, float]]:
  """Returns the errors of the loss and of all gradients together in the first training step, for each dispatcher."""

  def first_step(changed: Config) -> tuple[float, Any]:
    state, metrics = compiled(changed).train(init(0), make_batch(changed))
    return float(metrics["loss"]), optax.tree.get(state.opt_state, "mu")  # gradients, times one factor

  with jax.default_matmul_precision("highest"):
    loss, gradients = first_step(change(config, "sorted", "float32"))
  found = {}
  for name in dispatchers:
    ours, our_gradients = first_step(change(config, name, config.model.compute_dtype))
    found[name] = {"loss": abs(ours - loss) / loss, "step_gradients": error(our_gradients, gradients)}
  return found


# Speed


def median_seconds(function: Callable) -> float:
  """Returns the median of `--repeats` runs, after one run that compiles and one more to warm up."""
  times = []
  for _ in range(_REPEATS.value + 2):
    start = time.perf_counter()
    jax.block_until_ready(function())
    times.append(time.perf_counter() - start)
  return statistics.median(times[2:])


def ceiling(dtype: str) -> float:
  """Returns the operations per second of the fastest n x n matrix product, for the largest n, its half and quarter."""
  best = 0.0
  for n in (_MATMUL.value, _MATMUL.value // 2, _MATMUL.value // 4):
    a, b = (jax.random.normal(key, (n, n)).astype(dtype) for key in jax.random.split(jax.random.key(0)))
    best = max(best, 2 * n**3 / median_seconds(functools.partial(jax.jit(jnp.matmul), a, b)))
  return best


def time_layer(config: Config) -> tuple[float, float]:
  """Returns the seconds and the necessary operations of the layer, forward and backward."""
  model = dataclasses.replace(config.model, num_layers=1, num_dense_first=0, moe_every=1)
  flops = forward_flops(model, _VOCAB.value, config.data.sequence_length)
  needed = 3 * (flops.router + flops.experts) * tokens(config)
  params, run = make_layer(config)
  return median_seconds(functools.partial(run, params, *random_tokens(config))), needed


def time_step(config: Config, init: Callable) -> tuple[float, float]:
  """Returns the seconds and the necessary operations of the training step with AdamW."""
  steps, batch, held = compiled(config), make_batch(config), [init(0)]

  def step():
    held[0], metrics = steps.train(held[0], batch)
    return metrics["loss"]

  return median_seconds(step), step_flops(config, _VOCAB.value).model


def tokens(config: Config) -> int:
  return config.data.batch_size * config.data.sequence_length


def measure(config: Config, dispatchers: list[str]) -> dict[str, Any]:
  """Returns the report as plain values. Runs on JAX's default device."""
  init = compiled(change(config, "sorted")).init  # one for all dispatchers, whose states are the same
  with cli.said("checking the layer and the training step"):
    layer, step = check_layer(config, dispatchers), check_step(config, dispatchers, init)
  errors, limits = {d: layer[d] | step[d] for d in dispatchers}, TOLERANCE[config.model.compute_dtype]
  with cli.said("timing plain products"):
    peak = ceiling(config.model.compute_dtype)

  def speed(timed: tuple[float, float], tokens: int) -> dict[str, float]:
    seconds, needed = timed
    fraction = {"tflops": needed / seconds / 1e12, "of_ceiling": needed / seconds / peak}
    return {"milliseconds": 1e3 * seconds, "tokens_per_second": tokens / seconds, **fraction}

  rows = {}
  for name in dispatchers:
    changed = change(config, name)
    with cli.said(f"timing {name}"):
      timed = {"layer": time_layer(changed), "step": time_step(changed, init)}
    rows[name] = {part: speed(one, tokens(changed)) for part, one in timed.items()}
  return {
    "device": jax.config.jax_default_device.device_kind,
    "versions": versions(),
    "config": {part: config.to_dict()[part] for part in ("model", "data")} | {"vocab_size": _VOCAB.value},
    "errors": errors,
    "at_most": limits,
    "wrong": [f"{d} {what}" for d in dispatchers for what in limits if not errors[d][what] <= limits[what]],
    "ceiling_tflops": peak / 1e12,
    "speed": rows,
  }


def print_report(found: dict[str, Any], config: Config) -> None:
  model, moe, data = config.model, config.model.moe, config.data
  print(", ".join([found["device"], *(f"{name} {version}" for name, version in found["versions"].items())]))
  print(
    f"B={data.batch_size} L={data.sequence_length} D={model.model_dim} E={moe.num_experts} "
    f"K={moe.num_experts_per_token} F={moe.expert_dim} {model.compute_dtype}, {model.num_layers} layers in the step"
  )
  errors = {**found["errors"], "at most": found["at_most"]}
  width = max(map(len, errors))
  columns = list(found["at_most"])
  print(f"\n{'error':<{width}}" + "".join(f"{name:>15}" for name in columns))
  for name, row in errors.items():
    print(f"{name:<{width}}" + "".join(f"{row[column]:>15.2e}" for column in columns))
  print(f"\nceiling, plain products in {model.compute_dtype}: {found['ceiling_tflops']:.3g} TFLOP/s")
  print(f"{'':<{width}}             ms   tokens/s  TFLOP/s  of ceiling")
  for name, parts in found["speed"].items():
    for part, row in parts.items():
      numbers = f"{row['milliseconds']:>9.2f} {row['tokens_per_second']:>10.0f} {row['tflops']:>8.3g}"
      print(f"{name:<{width}} {part:<5} {numbers} {row['of_ceiling']:>11.1%}")
  print(
    "TFLOP/s counts the operations that the model needs, not those spent on empty slots or on moving tokens."
  )


def main(argv: list[str]) -> None:
  del argv
  config = given_config()
  for name in _DISPATCHERS.value:
    make_dispatcher(name)
  try:
    device = jax.devices(_PLATFORM.value)[0]
  except RuntimeError:
    here = jax.devices()[0].device_kind
    print(f"gpu_check: JAX finds no {_PLATFORM.value} here, only {here}: nothing was checked")
    return
  jax.config.update("jax_default_device", device)
  mesh = sharding.make_mesh(config.mesh, [device])
  for name in _DISPATCHERS.value:
    check_run(change(config, name), mesh)
  with jax.set_mesh(mesh):
    found = measure(config, _DISPATCHERS.value)
  if _JSON.value:
    print(json.dumps(found))
  else:
    print_report(found, config)
  if found["wrong"]:
    print(f"error: wrong values: {', '.join(found['wrong'])}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
  cli.run(main)
