"""A compiled model has the collectives on each axis that the documentation and the sharding table promise."""

import re
from typing import NamedTuple

import jax
import numpy as np
import pytest

from moe_jax import sharding
from moe_jax.config import MeshConfig
from moe_jax.training.compiled import compile_steps, resolve_config
from scripts import sharding_table
from tests import tiny

# Three layers, so that the loop over them stays one; no other dimension is 3, and weights are told from activations.
LAYERS, DIM, HIDDEN, LENGTH, VOCAB = 3, 24, 40, 32, 56
CONFIG = tiny.change(
  tiny.CONFIG,
  num_layers=LAYERS,
  model_dim=DIM,
  num_heads=4,
  num_kv_heads=2,
  head_dim=6,
  expert_dim=HIDDEN,
  sequence_length=LENGTH,
  balancers="none",
  jitter=0.0,
  remat="full",
)


class Collective(NamedTuple):
  kind: str
  shapes: tuple[tuple[int, ...], ...]  # of its results on one device
  in_loop: bool  # in the body of a while loop


def collectives(program: str) -> list[Collective]:
  """Those of a compiled program's text."""
  kinds = "all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute"
  bodies = set(re.findall(r"body=%?([\w.\-]+)", program))
  found, computation = [], ""
  for line in program.splitlines():
    if header := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(", line):
      computation = header.group(1)
    if made := re.search(rf"= (.*?) ({kinds})(?:-start)?\(", line):
      shapes = re.findall(r"\w+\[([\d,]*)\]", made.group(1))
      shapes = tuple(tuple(int(n) for n in shape.split(",") if n) for shape in shapes)
      found.append(Collective(made.group(2), shapes, computation in bodies))
  return found


def compiled(step: str, config, **sizes: int) -> list[Collective]:
  mesh = sharding.make_mesh(MeshConfig(**{"data": 1} | sizes))
  with jax.set_mesh(mesh):
    steps = compile_steps(config, VOCAB, tiny.DOMAINS, mesh)
    batch = {
      name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in tiny.make_batch(length=LENGTH).items()
    }
    lowered = getattr(steps, step).lower(steps.abstract_state, batch)
    return collectives(lowered.compile().as_text())


def test_tensor_costs_one_sum_per_block_forward():
  found = compiled("evaluate", CONFIG, tensor=2)
  in_loop = [c for c in found if c.in_loop]
  slots = (8, 8 * 16, DIM)  # experts, 8 sequences x 16 slots each at evaluation's capacity factor 2
  assert sorted((c.kind, c.shapes) for c in in_loop) == [
    ("all-reduce", ((8, LENGTH, DIM),)),  # attention: over the heads
    ("all-reduce", (slots,)),  # experts: over their hidden dimension
  ]
  assert {c.kind for c in found} == {"all-reduce"}  # embedding and softmax over the vocabulary: sums too
  assert max(np.prod(shape) for c in found if not c.in_loop for shape in c.shapes) == 8 * LENGTH * DIM


def test_fsdp_gathers_one_layer_at_a_time():
  gathers = [c for c in compiled("train", CONFIG, fsdp=4) if c.kind == "all-gather"]
  expert_weights = [c for c in gathers if any(np.prod(shape) == 8 * DIM * HIDDEN for shape in c.shapes)]
  assert [c.in_loop for c in expert_weights] == [True] * 6  # gate, up and down, in each direction
  outside = [shape for c in gathers if not c.in_loop for shape in c.shapes]
  assert sorted(int(np.prod(shape)) for shape in outside) == [DIM * VOCAB] * 2  # embedding and head
  one_layer = 8 * DIM * HIDDEN
  assert all(np.prod(shape) <= one_layer for c in gathers for shape in c.shapes)  # never the stack of layers


@pytest.mark.parametrize(("remat", "times"), [("full", 3), ("exchange", 2)])
def test_saved_rows_travel_once_forward(remat, times):
  """Rows travel to the experts and back; so do gradients; and all again where the layer is computed again."""
  config = tiny.change(CONFIG, dispatcher="einsum", remat=remat)
  found = [c for c in compiled("train", config, expert=4) if c.kind == "all-to-all"]
  assert len(found) == 2 * times and all(c.in_loop for c in found)


def test_the_reader_of_programs_tells_loops_apart():
  program = (
    "%b.1 (p: f32[2]) -> f32[2] {\n  %a = f32[2,3]{1,0} all-gather(%p), dimensions={0}\n}\n"
    "ENTRY %main (p: f32[2]) -> f32[2] {\n  %w = f32[2] while(%p), condition=%c, body=%b.1\n"
    "  %r = (f32[], s32[4]{0}) all-reduce-start(%p)\n}\n"
  )
  assert collectives(program) == [
    Collective("all-gather", ((2, 3),), True),
    Collective("all-reduce", ((), (4,)), False),
  ]


@pytest.mark.parametrize("dispatcher", ["einsum", "sorted", "dropless"])
def test_the_table_lists_every_constraint_of_the_program(dispatcher):
  """scripts/sharding_table.py says what the code does: each constraint in the traced step is one of its rows."""
  layout = MeshConfig(data=1, fsdp=2, expert=2, tensor=2)
  config = resolve_config(tiny.change(CONFIG, dispatcher=dispatcher, mesh=layout))
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    steps = compile_steps(config, VOCAB, tiny.DOMAINS, mesh)
    batch = jax.eval_shape(lambda: tiny.make_batch(length=LENGTH))
    jaxpr = jax.make_jaxpr(steps.train)(steps.abstract_state, batch)
  rows = {(t.shape, sharding.partition_spec(t.axes)) for t in sharding_table.constrained(config)}
  for t in sharding_table.parameters(steps.abstract_state):
    stacked = t.axes[0] == "layers"
    for axes in (t.axes, sharding.in_use(t.axes)):
      rows.add((t.shape[stacked:], sharding.partition_spec(axes[stacked:], t.shape[stacked:], mesh.shape)))
  used = set(_constraints(jaxpr.jaxpr))
  assert len(used) >= 10
  assert used <= rows, used - rows


def _constraints(jaxpr):
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "sharding_constraint":
      yield eqn.outvars[0].aval.shape, eqn.params["sharding"].spec
    for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
      if hasattr(inner, "eqns"):
        yield from _constraints(inner)
