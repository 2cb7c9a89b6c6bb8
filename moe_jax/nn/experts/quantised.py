"""Experts whose matrices are stored in few bits, and experts that are trained to be."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.errors import InputError
from moe_jax.nn.experts.base import ExpertNetwork, WrappingNetwork, inner_experts
from moe_jax.ops.experts import Product
from moe_jax.ops.quantisation import dequantise, format_of, quantise
from moe_jax.registry import Spec
from moe_jax.types import Array


class Quantised(nnx.Variable):
  """Codes or scales. No gradient and no optimizer changes them."""


def _matrices(network: ExpertNetwork) -> dict[str, nnx.Param]:
  return {
    name: w for name, w in vars(network).items() if isinstance(w, nnx.Param) and "num_in" in w.get_metadata()
  }


class _InFormat(WrappingNetwork):
  """A network whose matrices are in a format, stored or computed. `name` is the registered one, for errors."""

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
        f"experts {self.name}:experts={experts}: has no matrices of its own; the format goes inside, e.g. "
        f"expert_dropout:experts={self.name}"
      )
    self._store()

  def _store(self) -> None:
    """Replaces the matrices, where they are stored in the format."""


class QuantisedExperts(_InFormat):
  """The network `experts` with its matrices in `format`. They are not trained; biases are.

  A product multiplies by the dequantised matrix, in the type of the activations, so it is exact up to that type. With a
  compute type of bfloat16, float32 scales are rounded to it, too.

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
      blocks = own_scales.shape[1:]
      # One scale for a whole side is not split along it.
      of_scales = ("expert", *(axis if n > 1 else None for axis, n in zip(axes[1:], blocks, strict=True)))
      codes[name] = Quantised(own_codes, logical_axes=axes)
      scales[name] = Quantised(own_scales, logical_axes=of_scales)
      if self.has_factors:
        factors[name] = Quantised(jnp.ones(w.shape[:2]), logical_axes=axes[:2])
      sizes.append((name, w.shape[1], axes))
      setattr(self.experts, name, nnx.data(None))
    self.codes, self.scales, self.sizes = nnx.Dict(codes), nnx.Dict(scales), tuple(sizes)
    self.factors = nnx.Dict(factors)

  def __call__(self, rows: Array, product: Product) -> Array:
    network = nnx.merge(*nnx.split(self.experts))
    for name, num_rows, axes in self.sizes:
      w = dequantise(self.codes[name][...], self.scales[name][...], self.format, num_rows)
      if self.has_factors:
        w /= self.factors[name][...].astype(w.dtype)[..., None]
      setattr(network, name, nnx.data(nnx.Param(w.astype(rows.dtype), logical_axes=axes)))
    return network(rows, product)


class QuantisedTraining(_InFormat):
  """The network `experts`, computed as if its matrices were in `format`, and trained through the rounding.

  The gradient passes the rounding unchanged (straight-through, 1308.3432). In float32, `moe_jax.adapt.quantise`
  then changes nothing. With a compute type of bfloat16, what is rounded here is the matrix in bfloat16.

  Raises:
    InputError: as `QuantisedExperts`.
  """

  name = "quantised_training"

  def __call__(self, rows: Array, product: Product) -> Array:
    network = nnx.merge(*nnx.split(self.experts))
    for w in _matrices(network).values():
      value = w[...]
      rounded = dequantise(*quantise(value, self.format), self.format, value.shape[1]).astype(value.dtype)
      w.set_value(value + jax.lax.stop_gradient(rounded - value))
    return network(rows, product)
