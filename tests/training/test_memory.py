"""What a run needs is known before anything is allocated, and is never more than what the compiler asks for."""

import jax
import pytest

from moe_jax.comparison.comparison import Comparison
from moe_jax.errors import InputError
from moe_jax.sharding import batch_sharding, make_mesh
from moe_jax.training import memory
from moe_jax.training.compiled import compile_steps, resolve_config
from tests import tiny

CONFIG = resolve_config(tiny.change(tiny.CONFIG, num_layers=1))


def test_the_need_is_that_of_the_compiler_or_less():
  mesh = make_mesh(CONFIG.mesh)
  with jax.set_mesh(mesh):
    steps = compile_steps(CONFIG, tiny.VOCAB, tiny.DOMAINS, mesh)
    batch = jax.device_put(tiny.make_batch(), batch_sharding(mesh))
    compiled = steps.train.lower(steps.abstract_state, batch).compile().memory_analysis()
  need = memory.need_of(CONFIG, steps, tiny.VOCAB, mesh)
  in_batch = sum(x.nbytes for x in jax.tree.leaves(batch))
  in_state = compiled.argument_size_in_bytes - in_batch
  assert need.parameters + need.optimizer == pytest.approx(in_state, rel=1e-3)  # without what no step reads
  assert need.gradients + need.activations <= compiled.temp_size_in_bytes


def test_what_cannot_fit_is_refused_before_the_first_arm(tmp_path, monkeypatch):
  """A gigabyte of weights beside an arm that fits; nothing is trained."""
  monkeypatch.setattr(memory, "host_memory", lambda: 2 * memory.GIB)
  arms = {"small": {}, "large": {"expert_dim": 1 << 21}}
  comparison = Comparison(arms, [0], CONFIG, tmp_path / "run")
  message = (
    r"8.05e\+08 parameters need at least 12 GiB .* this host has 2 GiB; about 1.3e\+08 parameters would fit"
  )
  with pytest.raises(InputError, match=message):
    comparison.run()
  assert not (tmp_path / "run").exists()  # so that another configuration may have it


def test_the_check_can_be_turned_off(monkeypatch):
  monkeypatch.setattr(memory, "host_memory", lambda: 1)
  mesh = make_mesh(CONFIG.mesh)
  steps = compile_steps(CONFIG, tiny.VOCAB, tiny.DOMAINS, mesh)
  with pytest.raises(InputError, match="the activations alone do not fit"):
    memory.check_memory(CONFIG, steps, tiny.VOCAB, mesh)
  memory.check_memory(tiny.change(CONFIG, ignore_memory_check=True), steps, tiny.VOCAB, mesh)
