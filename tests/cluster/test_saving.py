"""Two real processes save a model whose parts both hold. The folder is that of one process, byte for byte."""

from flax import nnx

import moe_jax
from moe_jax.models import preset
from tests.cluster.pair import run_two
from tests.interop.helpers import random_model

_CHILD = """
import sys
import jax
address, index, source, out = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(address, 2, int(index))
import moe_jax
from moe_jax import sharding
from moe_jax.config import MeshConfig
assert jax.device_count() == 4 and jax.local_device_count() == 2
with jax.set_mesh(sharding.make_mesh(MeshConfig(data=1, {axes}))):
  loaded = moe_jax.load(source, mtp=True)
  moe_jax.save(loaded, out, shard_bytes=20_000)
  try:
    moe_jax.save(loaded, out)
  except moe_jax.errors.InputError as error:
    assert "already holds weights" in str(error)
  else:
    raise AssertionError
"""


def _contents(folder):
  return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_two_processes_write_what_one_does(tmp_path):
  config = preset("deepseek_v3_tiny").model  # biases of a balancer, latent attention, a module of prediction
  model = random_model(config)
  negative = lambda w: w.set_value(w[...].at[..., 0].set(-0.0))
  negative(next(v for path, v in nnx.to_flat_state(nnx.state(model)) if "w_down_EFD" in path))
  moe_jax.save(model, tmp_path / "source")
  moe_jax.save(moe_jax.load(tmp_path / "source", mtp=True), tmp_path / "one", shard_bytes=20_000)
  expected = _contents(tmp_path / "one")
  assert len(expected) > 4

  out, child = tmp_path / "two", _CHILD.replace("{axes}", "fsdp=2, expert=2")
  run_two(child, tmp_path / "source", out)
  assert _contents(out) == expected
