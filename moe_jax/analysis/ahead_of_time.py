"""Compiles a training step for devices that need not be present, and reports its cost on each of them."""

import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moe_jax import sharding
from moe_jax.analysis import flops, matrices
from moe_jax.analysis.collectives import by_kind, collectives, purpose
from moe_jax.analysis.hlo import Program, parse
from moe_jax.analysis.memory import Memory, memory_of, out_of_memory
from moe_jax.config import Config
from moe_jax.nn.build import different_blocks, resolve, routed_part
from moe_jax.training.compiled import make_init, make_train_step


class DoesNotFit(NamedTuple):
  """The memory figures of a program that the compiler rejected because it does not fit, in bytes per device."""

  needed: float
  capacity: float


class Compiled(NamedTuple):
  """A compiled training step."""

  text: str
  memory: Memory
  lower_seconds: float
  compile_seconds: float
  compile_cpu_seconds: float  # processor time of this process, more reliable on a busy machine


def abstract_batch(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes of the batch of one step."""
  shape = (config.data.batch_size, config.data.sequence_length)
  of = jax.ShapeDtypeStruct
  tokens = {name: of(shape, jnp.int32) for name in ("tokens_BL", "targets_BL")}
  return tokens | {"mask_BL": of(shape, jnp.bool_), "domain_B": of(shape[:1], jnp.int32)}


def compile_train_step(
  config: Config, vocab_size: int, mesh: Mesh, options: dict[str, str] | None = None
) -> Compiled | DoesNotFit:
  """Compiles forward pass, backward pass and optimizer, with donated state, as a run does. Creates no arrays.

  Args:
    config: what `moe_jax.training.compiled.check_run` returned.
    vocab_size: V.
    mesh: the mesh of devices to compile for.
    options: compiler options.
  """
  with jax.set_mesh(mesh):
    state = jax.eval_shape(make_init(config, vocab_size), 0)
    layout = sharding.state_shardings(mesh, state)
    step = jax.jit(
      make_train_step(config, vocab_size, num_domains=1),
      in_shardings=(layout, sharding.batch_sharding(mesh)),
      out_shardings=(layout, sharding.replicated(mesh)),
      donate_argnums=0,
    )
    start = time.monotonic()
    lowered = step.lower(state, abstract_batch(config))
    middle, cpu = time.monotonic(), time.process_time()
    try:
      compiled = lowered.compile(compiler_options=options or None)
    except jax.errors.JaxRuntimeError as error:
      found = out_of_memory(str(error))
      if found is None:
        raise
      return DoesNotFit(*found)
  return Compiled(
    text=compiled.as_text(),
    memory=memory_of(compiled, mesh.devices.flat[0].device_kind),
    lower_seconds=middle - start,
    compile_seconds=time.monotonic() - middle,
    compile_cpu_seconds=time.process_time() - cpu,
  )


def report(config: Config, vocab_size: int, mesh: Mesh, compiled: Compiled | DoesNotFit) -> dict[str, Any]:
  """Returns a report of plain values. Bytes and operations are those of one device in one step."""
  head = {
    "mesh": dict(mesh.shape),
    "devices": mesh.size,
    "device_kind": mesh.devices.flat[0].device_kind,
    "tokens_per_device": config.data.batch_size * config.data.sequence_length / mesh.size,
  }
  if isinstance(compiled, DoesNotFit):
    return head | {"fits": False, "peak_bytes": compiled.needed, "capacity_bytes": compiled.capacity}
  program, memory = parse(compiled.text), compiled.memory
  done, parts = flops.compiled_flops(program)
  needed = flops.step_flops(config, vocab_size, mesh.shape["expert"])
  routed = filter(None, map(routed_part, different_blocks(resolve(config.model))))
  spells_exchange = any(layer.dispatcher.spells_exchange for layer in routed)
  rows = by_kind(collectives(program, mesh.shape))
  rows = [row | {"purpose": purpose(row["kind"], row["axes"], spells_exchange)} for row in rows]
  return head | {
    "fits": None if memory.free is None else memory.free >= 0,
    "peak_bytes": memory.peak,
    "capacity_bytes": memory.capacity,
    "memory_bytes": {name: getattr(memory, name) for name in Memory._fields if name != "capacity"},
    "flops": {
      "compiled": done,
      "parts": parts,
      "model": needed.model / mesh.size,
      "recomputed": needed.recomputed / mesh.size,
      "ratio": done * mesh.size / sum(needed),
      "experts_ratio": parts["experts"]
      * mesh.size
      / flops.expert_flops(config, vocab_size, mesh.shape["expert"]),
    },
    "kernels": kernels(program),
    "collectives": rows,
    "exchange": exchange(config, mesh, rows),
    "unknown_loops": list(program.unknown_loops),
    "lower_seconds": compiled.lower_seconds,
    "compile_seconds": compiled.compile_seconds,
    "compile_cpu_seconds": compiled.compile_cpu_seconds,
  }


def kernels(program: Program) -> dict[str, int]:
  """Returns how often one device runs each kernel that is not XLA's own code: of attention, and of ragged products."""
  found: dict[str, int] = {}
  for _, instruction, runs in program.executed():
    target = re.search(r'custom_call_target="([^"]+)"', instruction.attributes)
    if target is not None and target.group(1) == "tpu_custom_call":
      name = re.sub(r"[.\d]+$", "", instruction.name).replace("_no_residuals", "").replace("_residuals", "")
    elif target is not None and "cudnn" in target.group(1):
      name = target.group(1)
    else:
      continue
    found[name] = found.get(name, 0) + runs
  return dict(sorted(found.items()))


def exchange(config: Config, mesh: Mesh, rows: list[dict]) -> dict[str, float] | None:
  """Compares the bytes sent between the devices that hold the experts with the bytes that must be sent.

  The latter assumes that the K experts of a token are on any device with equal probability. Rows are sent to their
  experts and back, in the forward and the backward pass, and again if the forward pass is recomputed. Returns None if
  an expert group has only one device, or the model no experts.
  """
  devices, model = mesh.shape["expert"], resolve(config.model)
  blocks = matrices.of_model(model, config.data.sequence_length)
  rows_per_token = sum(repeats * block.expert_rows for block, repeats in blocks)
  if devices == 1 or not rows_per_token:
    return None
  tokens = config.data.batch_size * config.data.sequence_length / mesh.size
  row_bytes = model.model_dim * jnp.dtype(model.compute_dtype).itemsize
  passes = 6 if model.remat == "full" else 4
  must = tokens * rows_per_token * row_bytes * (devices - 1) / devices * passes
  sent = sum(
    row["sent_bytes"] for row in rows if row["kind"].endswith("all-to-all") and row["axes"] == ["expert"]
  )
  return {"sent_bytes": sent, "must_move_bytes": must, "ratio": sent / must}
