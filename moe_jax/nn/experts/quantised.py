"""Experts whose matrices are stored in few bits, and experts that are trained to be."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.errors import InputError
from moe_jax.nn.experts.base import ExpertNetwork, WrappingNetwork, inner_experts
from moe_jax.ops.experts import Product
from moe_jax.ops.quantisation import dequantise, format_of, quantise
from moe_jax.registry import Spec, as_inner
from moe_jax.sharding import gathered, in_use
from moe_jax.types import Array


class Quantised(nnx.Variable):
  """Codes or scales. No gradient and no optimizer changes them."""


def _matrices(network: ExpertNetwork) -> dict[str, nnx.Param]:
  return {
    name: w for name, w in vars(network).items() if isinstance(w, nnx.Param) and "num_in" in w.get_metadata()
  }


class _InFormat(WrappingNetwork):
  """A network whose matrices are in a format, stored or computed. `name` is the registered one, for errors.

  In a step it is the network inside, with matrices made of whole ones: a device's part of a matrix may cut the blocks
  that share a scale.
  """

  name: str

  def __init__(
    self,
    num_experts: int,
    dim: int,
    expert_dim: int,
    *,
    format: str = "int8",
    group: int = 0,
    experts: Spec = "swiglu",
    init_scale: float = 1.0,
    rngs: nnx.Rngs,
  ):
    self.format = format_of(format, group)
    self.experts = inner_experts(experts, num_experts, dim, expert_dim, init_scale=init_scale, rngs=rngs)
    if not _matrices(self.experts):
      raise InputError(
        f"experts {self.name}:experts={as_inner(experts)}: has no matrices of its own; the format goes inside, e.g. "
        f"expert_dropout:experts={self.name}"
      )
    self._store()

  def _store(self) -> None:
    """Replaces the matrices, where they are stored in the format."""

  def _set_matrices(self, network: ExpertNetwork) -> None:
    """Gives a copy of the network inside the matrices that it computes with."""
    raise NotImplementedError

  def for_step(self, key: Array | None) -> ExpertNetwork:
    network = nnx.clone(self.experts.for_step(key))
    self._set_matrices(network)
    return network

  def __call__(self, rows: Array, product: Product) -> Array:
    return self.for_step(None)(rows, product)


class QuantisedExperts(_InFormat):
  """The network `experts` with its matrices in `format`. They are not trained; biases are.

  A product multiplies by the dequantised matrix, in the type of the activations, so it is exact up to that type.

  With `factors`, each row of a matrix has one, by which it was multiplied before it was rounded.

  Raises:
    InputError: if the format is unknown or has no groups of the given size, or `experts` has no matrices of its own.
  """

  name = "quantised"

  def __init__(
    self,
    num_experts: int,
    dim: int,
    expert_dim: int,
    *,
    format: str = "int8",
    group: int = 0,
    factors: bool = False,
    experts: Spec = "swiglu",
    init_scale: float = 1.0,
    rngs: nnx.Rngs,
  ):
    self.has_factors = factors
    options = {"format": format, "group": group, "experts": experts, "init_scale": init_scale}
    super().__init__(num_experts, dim, expert_dim, **options, rngs=rngs)

  def _store(self) -> None:
    codes, scales, factors, sizes = {}, {}, {}, []
    for name, w in _matrices(self.experts).items():
      axes = w.get_metadata()["logical_axes"]
      own_codes, own_scales = quantise(w[...], self.format)
      codes[name] = Quantised(own_codes, logical_axes=_axes_of(own_codes, w))
      scales[name] = Quantised(own_scales, logical_axes=_axes_of(own_scales, w))
      if self.has_factors:
        factors[name] = Quantised(jnp.ones(w.shape[:2]), logical_axes=axes[:2])
      sizes.append((name, w.shape[1], axes))
      setattr(self.experts, name, nnx.data(None))
    self.codes, self.scales, self.sizes = nnx.Dict(codes), nnx.Dict(scales), tuple(sizes)
    self.factors = nnx.Dict(factors)

  def _set_matrices(self, network: ExpertNetwork) -> None:
    for name, num_rows, axes in self.sizes:
      w = dequantise(_whole(self.codes[name]), _whole(self.scales[name]), self.format, num_rows)
      if self.has_factors:
        w /= _whole(self.factors[name])[..., None]
      setattr(network, name, nnx.data(nnx.Param(w, logical_axes=in_use(axes))))


def _axes_of(part: Array, w: nnx.Param) -> tuple[str | None, ...]:
  """Returns the logical axes of the codes or scales of a matrix, which may have fewer rows and columns than it has."""
  named = zip(w.get_metadata()["logical_axes"], part.shape, w.shape, strict=True)
  return tuple(axis if n == of_w else f"{axis}_block" for axis, n, of_w in named)


def _whole(stored: Quantised) -> Array:
  """Returns codes or scales as they are used. Gathering these sends fewer bytes than gathering the matrix."""
  return gathered(stored[...], stored.get_metadata()["logical_axes"])


def quantised_matrices(module: nnx.Module, to: str = "") -> list[tuple[int, int, int]]:
  """(number, inputs, outputs) of the matrices that quantised experts in `module` keep as codes, which are no parameters.

  With `to`, of those whose outputs have this logical axis.
  """
  return [
    (math.prod(codes.shape[:-2]), rows, codes.shape[-1])
    for _, experts in nnx.iter_modules(module)
    if isinstance(experts, QuantisedExperts)
    for name, rows, axes in experts.sizes
    if not to or axes[-1] == to
    for codes in [experts.codes[name].get_value()]
  ]


def quantised_size(module: nnx.Module, to: str = "") -> int:
  """Returns the elements of these matrices. A byte of codes may hold two."""
  return sum(number * rows * columns for number, rows, columns in quantised_matrices(module, to))


class QuantisedTraining(_InFormat):
  """The network `experts`, computed as if its matrices were in `format`, and trained through the rounding.

  The gradient passes the rounding unchanged (straight-through, 1308.3432). What is rounded is the parameter in float32,
  whatever the compute type, so `moe_jax.adapt.quantise` then finds the same codes.

  Raises:
    InputError: as `QuantisedExperts`.
  """

  name = "quantised_training"

  def _set_matrices(self, network: ExpertNetwork) -> None:
    for w in _matrices(network).values():
      value = w[...]
      rounded = dequantise(*quantise(value, self.format), self.format, value.shape[1])
      w.set_value(value + jax.lax.stop_gradient(rounded - value))
