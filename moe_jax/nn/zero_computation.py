"""Zero-computation experts (MoE++, 2410.07348): zero, copy, constant."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.nn.variables import matrix, weight
from moe_jax.types import Array


class ZeroComputation(nnx.Module):
  """Sum over z of weight_z times expert z, of the kinds (2410.07348, eq. 3-5):

    zero      0
    copy      x
    constant  a1 x + a2 v with a learned vector v and (a1, a2) = softmax(x W)

  Here the axis C counts the constant experts, and M the two parts that they mix. v starts standard normal, as
  in the released code: about the size of a normalised token.
  """

  def __init__(self, kinds: tuple[str, ...], dim: int, *, rngs: nnx.Rngs):
    self.copies = tuple(z for z, kind in enumerate(kinds) if kind == "copy")
    self.constants = tuple(z for z, kind in enumerate(kinds) if kind == "constant")
    c = len(self.constants)
    vector = lambda: jax.random.normal(rngs.params(), (c, dim), jnp.float32)
    self.vector_CD = nnx.Param(vector(), logical_axes=("zero_computation", "embed")) if c else None
    self.w_mix_DCM = matrix(rngs, (dim, c, 2), ("embed", "zero_computation", "mix")) if c else None

  def __call__(self, x_BLD: Array, weight_BLZ: Array) -> Array:
    """x_BLD of any float dtype and the router's `bypass_TZ` as weight_BLZ -> y_BLD."""
    copy_BL = sum((weight_BLZ[..., z] for z in self.copies), jnp.zeros(x_BLD.shape[:2], weight_BLZ.dtype))
    if not self.constants:
      return copy_BL[..., None].astype(x_BLD.dtype) * x_BLD
    weight_BLC = jnp.stack([weight_BLZ[..., z] for z in self.constants], axis=-1)
    logits_BLCM = jnp.einsum("BLD,DCM->BLCM", x_BLD.astype(jnp.float32), weight(self.w_mix_DCM))
    mix_BLCM = jax.nn.softmax(logits_BLCM, axis=-1)
    of_x_BL = copy_BL + jnp.sum(weight_BLC * mix_BLCM[..., 0], axis=-1)
    of_vector_BLC = (weight_BLC * mix_BLCM[..., 1]).astype(x_BLD.dtype)
    constant_BLD = jnp.einsum("BLC,CD->BLD", of_vector_BLC, weight(self.vector_CD, x_BLD.dtype))
    return of_x_BL[..., None].astype(x_BLD.dtype) * x_BLD + constant_BLD
