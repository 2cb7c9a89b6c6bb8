"""Experts whose products are in FP8."""

from collections.abc import Sequence

from flax import nnx

from moe_jax.errors import InputError
from moe_jax.nn.experts.base import WrappingNetwork, inner_experts
from moe_jax.ops.experts import Activation, Product, Wrapper
from moe_jax.ops.fp8 import TILE, fp8_product
from moe_jax.registry import Spec
from moe_jax.types import Array


class FP8Products(WrappingNetwork):
  """The network `experts` with every matrix product in FP8, as DeepSeek-V3 trains (2412.19437, section 3.3).

  Rows, hidden units and the gradients of outputs are E4M3 in tiles of 1 x 128, matrices in blocks of 128 x 128. The
  product that gives the gradient of a matrix reads tiles of 128 rows of an expert x 1. Parameters, activation
  functions, biases and everything outside of the experts keep their type. Sums are float32.

  Tiles of 128 rows are those of a device and of a micro-batch, so the gradient of a matrix depends on both. Dispatchers
  that leave the exchange to XLA have the tiles of all devices together. Hidden units are only split between tiles.

  Raises:
    InputError: in the forward pass, see `check_parts`.
  """

  def __init__(
    self,
    num_experts: int,
    dim: int,
    expert_dim: int,
    *,
    experts: Spec = "swiglu",
    init_scale: float = 1.0,
    rngs: nnx.Rngs,
  ):
    self.expert_dim = expert_dim
    self.experts = inner_experts(experts, num_experts, dim, expert_dim, init_scale=init_scale, rngs=rngs)

  def check_parts(self, parts: int) -> None:
    tile = TILE[1]
    if parts > 1 and self.expert_dim % (parts * tile):
      raise InputError(
        f"experts fp8_products: {parts} devices (tensor) would cut a tile of {tile} of the {self.expert_dim} hidden units "
        f"of an expert; use a multiple of {parts * tile}, the dispatcher sorted or einsum, or no tensor parallelism"
      )
    super().check_parts(parts)

  def __call__(self, rows: Array, product: Product) -> Array:
    self.check_parts(product.parts)
    return self.experts(rows, _InFP8(product))


class _InFP8(Wrapper):
  """A product of what FP8 stores of both factors."""

  def __call__(self, rows: Array, w_EXY: Array) -> Array:
    tile, num_tiles = self.row_tiles(rows, TILE[1])
    return fp8_product(super().__call__, rows, w_EXY, tile, num_tiles).astype(rows.dtype)

  def ffn(self, activation: Activation, rows: Array, w_in: Sequence[Array], w_out_EFD: Array) -> Array:
    return self(self.hidden(activation(*(self(rows, w) for w in w_in))), w_out_EFD)
