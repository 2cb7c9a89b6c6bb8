"""Parts of a user's whose matrices have other axes than those of this package."""

import jax
import jax.numpy as jnp
from flax import nnx

import moe_jax
from moe_jax.nn.ffn import FFNS

HEADS, HEAD_DIM = 4, 8


class Flat(nnx.Module):
  """A feed-forward part with two matrices."""

  def __init__(self, dim, rngs):
    self.a_DF = moe_jax.matrix(rngs, (dim, HEADS * HEAD_DIM), ("embed", "mlp"))
    self.b_FD = moe_jax.matrix(rngs, (HEADS * HEAD_DIM, dim), ("mlp", "embed"))

  def __call__(self, x_BLD, context):
    return jax.nn.relu(x_BLD @ self.a_DF[...]) @ self.b_FD[...], None


class Heads(nnx.Module):
  """The same, with the hidden axis written as two."""

  def __init__(self, dim, rngs):
    self.a_DNH = moe_jax.matrix(rngs, (dim, HEADS, HEAD_DIM), ("embed", "heads", "head_dim"))
    self.b_NHD = moe_jax.matrix(rngs, (HEADS, HEAD_DIM, dim), ("heads", "head_dim", "embed"), num_in=2)
    self.bias_NH = moe_jax.vector(jnp.zeros((HEADS, HEAD_DIM)), ("heads", "head_dim"))

  def __call__(self, x_BLD, context):
    hidden_BLNH = jax.nn.relu(jnp.einsum("BLD,DNH->BLNH", x_BLD, self.a_DNH[...]) + self.bias_NH[...])
    return jnp.einsum("BLNH,NHD->BLD", hidden_BLNH, self.b_NHD[...]), None


class Unrouted(nnx.Module):
  """Three experts, of which all tokens meet all. Nothing says so."""

  def __init__(self, dim, rngs):
    self.w_EDD = moe_jax.matrix(rngs, (3, dim, dim), ("expert", "embed", "mlp"))

  def __call__(self, x_BLD, context):
    return jnp.einsum("BLD,EDF->BLF", x_BLD, self.w_EDD[...]), None


class Beside(nnx.Module):
  """Routed experts beside two matrices of one's own."""

  def __init__(self, moe, dim, activation, init_scale, rngs):
    self.moe = FFNS["moe"](moe, dim, activation, init_scale, rngs)
    self.own = Heads(dim, rngs)

  def __call__(self, x_BLD, context):
    y_BLD, aux = self.moe(x_BLD, context)
    return y_BLD + self.own(x_BLD, context)[0], aux


class HeadExperts(moe_jax.ExpertNetwork):
  """Experts with the hidden axis written as two."""

  def __init__(self, num_experts, dim, expert_dim, *, rngs):
    e, d, n, h = num_experts, dim, 2, expert_dim // 2
    self.w_up_EDNH = moe_jax.matrix(rngs, (e, d, n, h), ("expert", "embed", "heads", "head_dim"))
    self.w_down_ENHD = moe_jax.matrix(rngs, (e, n, h, d), ("expert", "heads", "head_dim", "embed"), num_in=2)

  def __call__(self, rows, product):
    e, d = self.w_up_EDNH.shape[:2]
    hidden = jax.nn.relu(product(rows, self.w_up_EDNH[...].reshape(e, d, -1)))
    return product(hidden, self.w_down_ENHD[...].reshape(e, -1, d))


class Transposed(moe_jax.Router):
  """A linear router that is stored as a vector per expert."""

  def __init__(self, dim, num_experts, num_experts_per_token, *, rngs):
    self.k = num_experts_per_token
    self.w_ED = moe_jax.matrix(rngs, (num_experts, dim), ("router", "embed"))

  def __call__(self, x_GTD, context):
    return moe_jax.top_k(moe_jax.project(x_GTD, self.w_ED[...].T), self.k, context)
