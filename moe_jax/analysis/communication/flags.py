"""The flags of a simulated machine, and of the layer that it runs."""

import dataclasses

from absl import flags

from moe_jax.analysis.communication.machine import Machine
from moe_jax.analysis.communication.simulate import Layer


def define_flags() -> None:
  """Defines a flag for each field of `Machine`, and the sizes of the layer."""
  flags.DEFINE_integer("nodes", 4, "of the simulated machine")
  flags.DEFINE_integer("devices_per_node", 4, "of the simulated machine")
  flags.DEFINE_float("local_bandwidth", 160e9, "bytes/s of a device's port inside its node, each way")
  flags.DEFINE_float("network_bandwidth", 50e9, "bytes/s of a network port, each way")
  flags.DEFINE_string("network_ports", "device", "device | node: what has a network port")
  flags.DEFINE_float("flops", 400e12, "per second and device, in products with experts")
  flags.DEFINE_integer("layer_dim", 2048, "D of the simulated layer", lower_bound=1)
  flags.DEFINE_integer("layer_expert_dim", 768, "F of the simulated layer", lower_bound=1)


def machine() -> Machine:
  return Machine(**{field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(Machine)})


def layer() -> Layer:
  return Layer(flags.FLAGS.layer_dim, flags.FLAGS.layer_expert_dim)
