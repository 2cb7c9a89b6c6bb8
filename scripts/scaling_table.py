r"""Compiles the training step for a series of topologies and counts the cost per chip.

  python scripts/scaling_table.py --preset=tiny --fsdp_parallelism=8 --expert_parallelism=1
  python scripts/scaling_table.py --preset=tiny --topologies=cpu:2 --expert_parallelism=2            # without libtpu

--batch_size is that of the first topology. It grows with the number of devices, so that tokens per chip stay constant.
One mesh axis is open (-1, by default data) and takes the added devices. The script prints operations and memory per
chip, and what each kind of collective sends. It measures no times.
"""

import dataclasses
from typing import Any

from absl import flags

from moe_jax import cli, sharding
from moe_jax.analysis import topology
from moe_jax.analysis.ahead_of_time import compile_train_step, report
from moe_jax.analysis.memory import GIB
from moe_jax.config import Config
from moe_jax.errors import InputError
from moe_jax.models import VOCAB_SIZES
from moe_jax.training.compiled import check_run

_TOPOLOGIES = flags.DEFINE_list(
  "topologies",
  ["v5e:2x4", "v5e:4x4", "v5e:4x8", "v5e:8x8", "v5e:8x16", "v5e:16x16"],
  f"what to compile for, smallest first: {topology.EXAMPLES}",
)
_VOCAB = flags.DEFINE_integer("vocab_size", 0, "V; 0: that of the preset", lower_bound=0)


def row(name: str, config: Config, vocab_size: int, first: int | None) -> dict[str, Any]:
  """Returns the report on topology `name`. The batch grows in proportion to its devices divided by `first`."""
  devices = topology.devices_of(name)
  size = config.data.batch_size * len(devices)
  if size % (first or len(devices)):
    raise InputError(f"--topologies={name}: its {len(devices)} devices give no whole batch in proportion")
  data = dataclasses.replace(config.data, batch_size=size // (first or len(devices)))
  config = dataclasses.replace(config, data=data)
  mesh = sharding.make_mesh(config.mesh, devices)
  config = check_run(config, mesh)
  compiled = compile_train_step(config, vocab_size, mesh, topology.compiler_options(devices))
  found = report(config, vocab_size, mesh, compiled)
  if "flops" not in found:
    raise InputError(f"--topologies={name}: the step does not fit: {found['peak_bytes'] / GIB:.2f} GiB")
  return found


def print_row(name: str, found: dict[str, Any]) -> None:
  mesh = " x ".join(f"{axis}={size}" for axis, size in found["mesh"].items() if size > 1)
  sent = "; ".join(
    f"{one['kind']} {'+'.join(one['axes'])} {one['count']} x, {one['sent_bytes'] / 2**20:.3f} MiB"
    for one in found["collectives"]
  )
  cells = [name, found["devices"], mesh, f"{found['tokens_per_device']:.0f}"]
  cells += [f"{found['flops']['compiled'] / 1e9:.6g}", f"{found['peak_bytes'] / 2**20:.2f}", sent]
  print("|", " | ".join(map(str, cells)), "|", flush=True)


def main(argv: list[str]) -> None:
  del argv
  config = cli.config_from_flags().check()
  vocab_size = _VOCAB.value or VOCAB_SIZES[flags.FLAGS.preset]
  print(
    "| topology | chips | mesh | tokens per chip | GFLOP per chip | peak MiB per chip | each chip sends |"
  )
  print("|---|---|---|---|---|---|---|")
  first = None
  for name in _TOPOLOGIES.value:
    found = row(name, config, vocab_size, first)
    first = first or found["devices"]
    print_row(name, found)


if __name__ == "__main__":
  cli.define_flags()
  flags.adopt_module_key_flags(cli)  # shown by --help
  cli.run(main)
