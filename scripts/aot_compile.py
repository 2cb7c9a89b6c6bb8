r"""Compiles the whole training step for devices that need not be present, and reports whether it fits.

  python scripts/aot_compile.py --preset=mixtral_8x7b --topology=v5p:4x4x4 --fsdp_parallelism=64
  python scripts/aot_compile.py --preset=mixtral_8x7b --topology=v5p:4x4x4 --dispatcher=einsum \
      --fsdp_parallelism=16 --expert_parallelism=4
  python scripts/aot_compile.py --preset=mixtral_8x7b --topology=v5p:4x4x4 --search
  python scripts/aot_compile.py --preset=tiny --topology=cpu:8 --expert_parallelism=4        # without libtpu

The step is forward, backward and AdamW. It is compiled from shapes alone, so no weights are in memory. The script
prints memory per chip by kind and whether it fits, operations compared with those that the model needs, and the
collectives with their bytes. TPU topologies need `pip install -e '.[tpu]'` but no TPU. --slice_parallelism=2 means
two slices of the topology. --batch_size is the total over all devices.
"""

import json
from typing import Any

import jax
from absl import flags
from jax.sharding import AbstractMesh

from moe_jax import cli, disk, sharding
from moe_jax.analysis import topology
from moe_jax.analysis.ahead_of_time import compile_train_step, report
from moe_jax.analysis.memory import GIB, HBM_BYTES
from moe_jax.analysis.mesh_search import Estimate, all_meshes, estimates
from moe_jax.config import Config, MeshConfig
from moe_jax.errors import InputError
from moe_jax.models import VOCAB_SIZES
from moe_jax.training.compiled import check_run

_TOPOLOGY = flags.DEFINE_string("topology", "cpu:8", f"what to compile for: {topology.EXAMPLES}")
_VOCAB = flags.DEFINE_integer("vocab_size", 0, "V; 0: that of the preset", lower_bound=0)
_SEARCH = flags.DEFINE_bool(
  "search", False, "try many meshes instead of the given one, and rank those that fit"
)
_TRIES = flags.DEFINE_integer(
  "search_tries", 5, "how many meshes the search compiles, most promising first", lower_bound=1
)
_HBM = flags.DEFINE_float(
  "hbm_gib", 0.0, "limit of the TPU compiler for memory per chip; 0: all of it", lower_bound=0
)
_OUT = flags.DEFINE_string("output", "", "write the complete report to this JSON file")
_HLO = flags.DEFINE_string("hlo", "", "write the compiled program to this text file")


def compile_one(config: Config, vocab_size: int, devices: list[jax.Device]) -> dict[str, Any]:
  """Returns the report on `config` and its mesh."""
  mesh = sharding.make_mesh(config.mesh, devices)
  config = check_run(config, mesh)
  compiled = compile_train_step(config, vocab_size, mesh, topology.compiler_options(devices, _HBM.value))
  if _HLO.value and hasattr(compiled, "text"):
    disk.write_text(_HLO.value, compiled.text)
  return report(config, vocab_size, mesh, compiled)


def candidates(config: Config, vocab_size: int, devices: list[jax.Device]) -> list[Estimate]:
  """Meshes that divide the model and whose state alone fits, the most promising first.

  Raises:
    InputError: there is none.
  """
  capacity = HBM_BYTES.get(devices[0].device_kind, float("inf"))
  meshes, reason = [], None
  for mesh in all_meshes(len(devices), max(config.mesh.slice, 1)):
    sizes = {name: getattr(mesh, name) for name in sharding.MESH_AXES}
    abstract = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    try:
      check_run(with_mesh(config, mesh), abstract)
      meshes.append((mesh, abstract))
    except InputError as error:
      reason = error
  if not meshes:
    raise InputError(
      f"--search: no mesh of {len(devices)} devices divides the model; of the last one: {reason}"
    )
  found = estimates(config, vocab_size, meshes)
  small = [one for one in found if one.state_bytes < capacity]
  if not small:
    least = min(one.state_bytes for one in found)
    raise InputError(
      f"--topology={_TOPOLOGY.value}: parameters and optimizer state alone are at least {least / GIB:.1f} GiB per chip, "
      f"more than its {capacity / GIB:.0f} GiB; use more chips"
    )
  return small


def with_mesh(config: Config, mesh: MeshConfig) -> Config:
  return Config(**{**vars(config), "mesh": mesh})


def mesh_name(sizes: dict[str, int]) -> str:
  return " x ".join(f"{name}={size}" for name, size in sizes.items() if size > 1) or "1 device"


def size_of(number: float) -> str:
  unit, name = (GIB, "GiB") if abs(number) >= 2**30 / 100 else (2**20, "MiB")
  return f"{number / unit:10.3f} {name}"


def print_report(found: dict[str, Any]) -> None:
  """One screen."""
  print(f"mesh: {mesh_name(found['mesh'])} ({found['devices']} {found['device_kind']})")
  print(f"tokens per chip and step: {found['tokens_per_device']:.0f}")
  print("\nmemory per chip")
  for name, number in found.get("memory_bytes", {}).items():
    print(f"  {name:12s} {size_of(number)}")
  print(f"  {'peak':12s} {size_of(found['peak_bytes'])}")
  if found["capacity_bytes"]:
    free = found["capacity_bytes"] - found["peak_bytes"]
    verdict = f"fits, {free / GIB:.2f} GiB free" if free >= 0 else f"does NOT fit, by {-free / GIB:.2f} GiB"
    print(f"  {'capacity':12s} {size_of(found['capacity_bytes'])}   {verdict}")
  else:
    print("  capacity unknown for this kind of device")
  if "flops" not in found:
    return
  numbers = found["flops"]
  print("\noperations per chip and step (products only)")
  print(f"  model        {numbers['model'] / 1e12:10.4g} T")
  print(f"  recomputed   {numbers['recomputed'] / 1e12:10.4g} T")
  print(
    f"  compiled     {numbers['compiled'] / 1e12:10.4g} T   {numbers['ratio']:.3f} x (model + recomputed)"
  )
  for name, number in numbers["parts"].items():
    ratio = f"   {numbers['experts_ratio']:.3f} x the experts' share" if name == "experts" else ""
    print(f"    {name:10s} {number / 1e12:10.4g} T{ratio}")
  if found["unknown_loops"]:
    print(
      f"  {len(found['unknown_loops'])} loops run as often as data says; counted once, so `compiled` is too low"
    )
  print("\nkernels per chip and step")
  for name, count in found["kernels"].items():
    print(f"  {name:24s} {count:5d} x")
  if not any(name.startswith(("splash", "__cudnn")) for name in found["kernels"]):
    print("  none of attention: blocks of XLA")
  print("\ncollectives per chip and step")
  for row in found["collectives"]:
    axes = ",".join(row["axes"])
    what = row["purpose"] or "NOT explained by the layouts of moe_jax/sharding/__init__.py"
    print(f"  {row['kind']:18s} {axes:16s} {row['count']:5d} x   sends {size_of(row['sent_bytes'])}   {what}")
  if found["exchange"]:
    print(f"  tokens to experts and back: {found['exchange']['ratio']:.3f} x the bytes that must move")
  print(f"\nlowered in {found['lower_seconds']:.1f} s, compiled in {found['compile_seconds']:.1f} s", end=" ")
  print(f"({found['compile_cpu_seconds']:.1f} s of processor time)")


def search(config: Config, vocab_size: int, devices: list[jax.Device]) -> list[dict[str, Any]]:
  """Reports of the most promising meshes: those that fit first, by what they send; then the others, by their peak."""
  tried = candidates(config, vocab_size, devices)
  print(
    f"{len(tried)} meshes divide the model and can hold its state; compiling {min(len(tried), _TRIES.value)}"
  )
  found = [compile_one(with_mesh(config, one.mesh), vocab_size, devices) for one in tried[: _TRIES.value]]
  sends = lambda one: sum(row["sent_bytes"] for row in one.get("collectives", []))
  found.sort(key=lambda one: (one["fits"] is False, sends(one), one["peak_bytes"]))
  print(f"{'mesh':44s} {'peak GiB':>9s} {'sent GiB':>9s} {'ratio':>7s}")
  for one in found:
    ratio = f"{one['flops']['ratio']:7.3f}" if "flops" in one else "      -"
    fits = "" if one["fits"] is not False else "   does not fit"
    print(
      f"{mesh_name(one['mesh']):44s} {one['peak_bytes'] / GIB:9.2f} {sends(one) / GIB:9.3f} {ratio}{fits}"
    )
  return found


def main(argv: list[str]) -> None:
  del argv
  config = cli.config_from_flags().check()
  vocab_size = _VOCAB.value or VOCAB_SIZES[flags.FLAGS.preset]
  for flag in (_OUT, _HLO):
    if flag.value:
      disk.check_file(flag.value, flag.name)
  devices = topology.devices_of(_TOPOLOGY.value, max(config.mesh.slice, 1))
  if _SEARCH.value:
    found = search(config, vocab_size, devices)
  else:
    found = compile_one(config, vocab_size, devices)
    print_report(found)
  if _OUT.value:
    head = {
      "preset": flags.FLAGS.preset,
      "topology": _TOPOLOGY.value,
      "jax": jax.__version__,
      "vocab_size": vocab_size,
    }
    text = json.dumps(head | {"config": config.to_dict(), "result": found}, indent=2)
    disk.write_text(_OUT.value, f"{text}\n")


if __name__ == "__main__":
  cli.define_flags()
  flags.adopt_module_key_flags(cli)  # shown by --help
  cli.run(main)
