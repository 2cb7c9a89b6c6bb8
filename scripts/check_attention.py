r"""Checks the attention kernel of this backend against blocks of XLA, and times both.

  python scripts/check_attention.py
  python scripts/check_attention.py --forms='64|window'                                   # only these
  python scripts/check_attention.py --length=256 --batch_size=1 --repeats=1 --splash      # without a GPU or TPU

For each form of attention, in bfloat16: the kernel that `kernel=auto` takes, the custom calls of the compiled program, the
largest difference of values and gradients from float32, relative to the largest value, for the kernel and for XLA, the
milliseconds of both, forward and backward, and whether two runs give the same bits. Then one training step of a small
model whose configuration says nothing about kernels. It prints as it goes: on an H200, a form took up to 90 s, most of them to
compile, because XLA tries several kernels for every matrix product (XLA_FLAGS=--xla_gpu_autotune_level=0 does not). The exit status is 1 if the kernel is more
than four times as far from float32 as XLA in bfloat16. --splash runs the kernel of a TPU in Pallas' interpreter.
"""

import functools
import re
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from moe_jax import cli, sharding
from moe_jax.analysis.ahead_of_time import compile_train_step
from moe_jax.config import Config, DataConfig, MeshConfig, ModelConfig, MoEConfig
from moe_jax.errors import InputError
from moe_jax.ops import attention_kernels
from moe_jax.ops.attention import attend as by_xla
from moe_jax.sharding.attention import attend
from moe_jax.training.compiled import check_run

_LENGTH = flags.DEFINE_integer("length", 4096, "L", lower_bound=128)
_BATCH = flags.DEFINE_integer("batch_size", 2, "B", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 10, "timed runs; their median is reported", lower_bound=1)
_FORMS = flags.DEFINE_string("forms", "", "a regular expression: only forms with such a name; empty: all")
_SPLASH = flags.DEFINE_bool("splash", False, "interpret the kernel of a TPU instead")

# N, heads of keys, H, width of values, and options of `attend`.
FORMS: dict[str, tuple[int, int, int, int, dict[str, Any]]] = {
  "4 heads of keys for 16": (16, 4, 128, 128, {}),
  "heads of 64": (16, 4, 64, 64, {}),
  "heads of 256": (8, 8, 256, 256, {}),
  "window of 128": (16, 4, 128, 128, {"window": 128}),
  "padding on the left": (16, 4, 128, 128, {"pad_B": 37}),
  "the same in a window": (16, 4, 128, 128, {"pad_B": 37, "window": 128}),
  "latent: 192, values of 128": (16, 16, 192, 128, {"scale": 0.1}),
  "sinks": (16, 4, 64, 64, {"sink_N": 1.0, "window": 128}),
  "packed texts": (16, 4, 128, 128, {"segment_BL": 700}),
}
AT_MOST = 4.0  # times the error of XLA


def custom_calls(text: str) -> list[str]:
  """Returns the targets of the custom calls of a compiled program that may be attention kernels."""
  found = sorted(set(re.findall(r'custom_call_target="([^"]+)"', text)))
  return [name for name in found if "cudnn" in name or "tpu_custom_call" in name or "fmha" in name]


def gradients_of(run: Callable, cotangent: jax.Array) -> Callable:
  """Returns a compiled (query, key, value) -> (values, their three gradients), in float32."""

  def loss(query, key, value):
    out = run(query, key, value)
    return jnp.vdot(out.astype(jnp.float32), cotangent), out

  @jax.jit
  def both(*arrays):
    gradients, out = jax.grad(loss, (0, 1, 2), has_aux=True)(*arrays)
    return tuple(x.astype(jnp.float32) for x in (out, *gradients))

  return both


def milliseconds(run: Callable, arrays: list[jax.Array]) -> float:
  times = []
  for _ in range(_REPEATS.value + 1):
    start = time.perf_counter()
    jax.block_until_ready(run(*arrays))
    times.append(1e3 * (time.perf_counter() - start))
  return statistics.median(times[1:])


def check(name: str) -> bool:
  """Prints the line of a form, and returns whether the kernel is exact enough."""
  heads, kv_heads, width, value_width, options = FORMS[name]
  shape, rng = (_BATCH.value, _LENGTH.value), np.random.default_rng(0)
  draw = lambda *sizes: jnp.asarray(rng.normal(size=(*shape, *sizes)), jnp.bfloat16)
  arrays = [draw(heads, width), draw(kv_heads, width), draw(kv_heads, value_width)]
  cotangent = draw(heads, value_width).astype(jnp.float32)
  options, form = dict(options), {}
  if "pad_B" in options:
    options["pad_B"] = jnp.arange(_BATCH.value, dtype=jnp.int32) * options["pad_B"] + 5
    text_BL = jnp.arange(_LENGTH.value)[None] >= options["pad_B"][:, None]
    cotangent *= text_BL[:, :, None, None]
  if "segment_BL" in options:
    number_L = jnp.arange(_LENGTH.value, dtype=jnp.int32) // options["segment_BL"]
    options["segment_BL"] = form["segment_BL"] = jnp.broadcast_to(number_L, shape)
  if "sink_N" in options:
    options["sink_N"] = form["sink_N"] = jnp.full(heads, options["sink_N"])
  kernel = attention_kernels.kernel_for(sharding.platform(), *arrays, **form) or "blocks of XLA"
  run = functools.partial(attend, **options)
  if _SPLASH.value:
    kernel, run = "splash", functools.partial(attention_kernels.splash, interpret=True, **options)
  ours = gradients_of(run, cotangent)
  theirs = gradients_of(functools.partial(by_xla, **options), cotangent)
  start = time.perf_counter()
  ours = ours.lower(*arrays).compile()
  seconds = time.perf_counter() - start
  calls = custom_calls(ours.as_text())
  print(f"{name}: {kernel}; calls {', '.join(calls) or 'none'}; compiled in {seconds:.0f} s", flush=True)
  with jax.default_matmul_precision("highest"):
    right = gradients_of(functools.partial(by_xla, **options), cotangent)(
      *(x.astype(jnp.float32) for x in arrays)
    )
  seen = 1.0 if "pad_B" not in options else text_BL[:, :, None, None]
  off = lambda found: [
    float(jnp.max(jnp.abs((x - y) * (seen if i == 0 else 1))) / jnp.max(jnp.abs(y)))
    for i, (x, y) in enumerate(zip(found, right))
  ]
  first, second, plain = ours(*arrays), ours(*arrays), off(theirs(*arrays))
  same = all(bool(jnp.array_equal(a, b)) for a, b in zip(first, second))
  errors = off(first)
  times = milliseconds(ours, arrays), milliseconds(theirs, arrays)
  text = " ".join(f"{a:.1e}|{b:.1e}" for a, b in zip(errors, plain))
  fine = all(a <= AT_MOST * max(b, 2**-9) for a, b in zip(errors, plain))
  print(f"  kernel|XLA, values and gradients of queries, keys, values: {text}{'' if fine else ' WRONG'}")
  print(
    f"  {times[0]:.2f} ms, XLA {times[1]:.2f} ms; two runs {'are bit-equal' if same else 'differ'}",
    flush=True,
  )
  return fine


def chosen() -> list[str]:
  """Returns the names of the forms to check. Raises `InputError` if there are none."""
  try:
    found = [name for name in FORMS if re.search(_FORMS.value, name)]
  except re.error as error:
    raise InputError(f"--forms={_FORMS.value}: is no regular expression ({error})") from None
  if not found:
    raise InputError(f"--forms={_FORMS.value}: no form has such a name; known: {'; '.join(FORMS)}")
  return found


def check_step(mixer: str) -> None:
  """Prints which kernels are in the compiled training step of a small model."""
  model = ModelConfig(
    num_layers=2, model_dim=512, num_heads=8, num_kv_heads=2, head_dim=64, qk_norm=True, mixer=mixer,
    compute_dtype="bfloat16", moe=MoEConfig(num_experts=8, expert_dim=256),
  )  # fmt: skip
  config = Config(model=model, data=DataConfig(batch_size=2, sequence_length=512), mesh=MeshConfig(data=1))
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  compiled = compile_train_step(check_run(config, mesh), 512, mesh)
  calls = custom_calls(compiled.text)
  print(f"training step with --mixer={mixer}: {', '.join(calls) or 'no kernel of attention'}", flush=True)


def main(argv: list[str]) -> None:
  del argv
  print(
    f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, L={_LENGTH.value} B={_BATCH.value}", flush=True
  )
  fine = [check(name) for name in chosen()]
  for mixer in ("attention", "mla"):
    check_step(mixer)
  if not all(fine):
    print("error: a kernel is not as exact as XLA", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
  cli.run(main)
