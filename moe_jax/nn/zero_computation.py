"""Zero-computation experts (MoE++, 2410.07348): zero, copy, constant."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.nn.variables import matrix
from moe_jax.types import Array

KINDS = ("zero", "copy", "constant")


class ZeroComputation(nnx.Module):
  """Sum over z of weight_z times expert z: `zero` gives 0, `copy` gives x, and `constant` gives
  a1 x + a2 v with a learned vector v and (a1, a2) = softmax(x W) (2410.07348, eq. 2-4)."""

  def __init__(self, kinds: tuple[str, ...], dim: int, *, rngs: nnx.Rngs):
    self.kinds = kinds
    z = kinds.count("constant")
    self.vector_ZD = matrix(rngs, (z, dim), ("zero_computation", "embed")) if z else None
    self.w_mix_ZDM = matrix(rngs, (z, dim, 2), ("expert", "embed", "mix")) if z else None

  def __call__(self, x_BLD: Array, weight_BLZ: Array) -> Array:
    weight_BLZ = weight_BLZ.astype(x_BLD.dtype)
    is_copy = jnp.array([kind == "copy" for kind in self.kinds], x_BLD.dtype)
    y_BLD = jnp.einsum("BLZ,Z->BL", weight_BLZ, is_copy)[..., None] * x_BLD
    constants = [z for z, kind in enumerate(self.kinds) if kind == "constant"]
    if not constants:
      return y_BLD
    weight_BLC = weight_BLZ[..., jnp.array(constants)]
    mix_BLZM = jax.nn.softmax(jnp.einsum("BLD,ZDM->BLZM", x_BLD, self.w_mix_ZDM[...].astype(x_BLD.dtype)))
    y_BLD += jnp.einsum("BLZ,BLZ->BL", weight_BLC, mix_BLZM[..., 0])[..., None] * x_BLD
    vector_ZD = self.vector_ZD[...].astype(x_BLD.dtype)
    return y_BLD + jnp.einsum("BLZ,ZD->BLD", weight_BLC * mix_BLZM[..., 1], vector_ZD)
