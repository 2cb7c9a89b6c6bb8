"""Routers whose logits are more than one matrix product: a cosine, a network, a normed input."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.errors import InputError, require_option
from moe_jax.nn.routers.base import project
from moe_jax.nn.routers.linear import ChoiceRouter, LinearRouter
from moe_jax.nn.variables import matrix, vector, weight
from moe_jax.ops.routing.topk import scored_topk
from moe_jax.sharding import constrain
from moe_jax.types import Array, RouterContext, Routing

ACTIVATIONS = {"relu": jax.nn.relu, "gelu": jax.nn.gelu, "silu": jax.nn.silu, "tanh": jnp.tanh}
MIN_TEMPERATURE = 0.01
MIN_NORM = 1e-6  # of a vector that is divided by its norm
INTO, OUT = ("embed", "router_hidden"), ("router_hidden", "router")  # logical axes


class CosineTopK(ChoiceRouter):
  """Cosine router (X-MoE, 2204.09179): logits are cosines of a projected token and an expert, over a temperature.

  The logit of expert e is cos(x W, v_e) / t, with W of `width` columns, a vector v_e for each expert and a learned
  temperature t of at least 0.01. Tokens and experts meet on a sphere of few dimensions, so that routing pulls the
  representations of tokens less towards a few directions.

  The paper was not re-read. That the width is half the number of experts, and that the weight of an expert is its
  score among all of them, is from memory. The bound of t, its logarithm as the parameter and its first value are
  those of Tutel's `CosineTopKGate`, which has a width of 256 and a bias in the projection.

  Args:
    width: the number of columns of W; 0: E/2.
    temperature: t at the start.
    score: softmax, sigmoid or sqrt_softplus of the logits.
    normalize: divide a token's weights by their sum.

  Raises:
    InputError: if the width is negative, the temperature is below 0.01, or the score is unknown.
  """

  def __init__(
    self,
    dim: int,
    num_experts: int,
    num_experts_per_token: int,
    *,
    width: int = 0,
    temperature: float = 0.5,
    score: str = "softmax",
    normalize: bool = False,
    rngs: nnx.Rngs,
  ):
    if width < 0:
      raise InputError(f"router cosine_topk: width must be 1 or more, or 0 for half the experts, got {width}")
    if not temperature >= MIN_TEMPERATURE:
      raise InputError(
        f"router cosine_topk: temperature must be {MIN_TEMPERATURE} or more, got {temperature}"
      )
    super().__init__(scored_topk("cosine_topk", num_experts_per_token, score, normalize))
    width = width or max(num_experts // 2, 1)
    # Only directions matter, so the scale of the initialisation does not.
    self.w_token_DX = matrix(rngs, (dim, width), INTO)
    self.w_expert_XE = matrix(rngs, (width, num_experts), OUT)
    self.log_inverse_temperature = vector(-math.log(temperature), ())

  def logits(self, x_GTD: Array) -> Array:
    largest = -math.log(MIN_TEMPERATURE)
    inverse_temperature = jnp.exp(jnp.minimum(self.log_inverse_temperature[...], largest))
    token_GTX = _unit(project(x_GTD, weight(self.w_token_DX)), axis=-1)
    cosine_GTE = project(token_GTX, _unit(weight(self.w_expert_XE), axis=0))
    return constrain(cosine_GTE * inverse_temperature, ("group", None, None))


def _unit(x: Array, axis: int) -> Array:
  """Returns x divided by its norm along `axis`. The gradient is finite at 0, too."""
  square = jnp.sum(x * x, axis=axis, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(square, MIN_NORM**2))


class MLPTopK(ChoiceRouter):
  """Top-k of the logits of a network: activation(x W1) W2, without biases.

  Args:
    hidden: the number of hidden units; 0: D.
    activation: relu, gelu, silu or tanh.
    score: softmax, sigmoid or sqrt_softplus of the logits.
    normalize: divide a token's weights by their sum.

  Raises:
    InputError: if the number of hidden units is negative, or the activation or the score is unknown.
  """

  def __init__(
    self,
    dim: int,
    num_experts: int,
    num_experts_per_token: int,
    *,
    hidden: int = 0,
    activation: str = "relu",
    score: str = "softmax",
    normalize: bool = True,
    init_scale: float = 1.0,
    rngs: nnx.Rngs,
  ):
    require_option("router mlp_topk", "activation", activation, tuple(ACTIVATIONS))
    if hidden < 0:
      raise InputError(
        f"router mlp_topk: hidden must be 1 or more, or 0 for the model dimension, got {hidden}"
      )
    super().__init__(scored_topk("mlp_topk", num_experts_per_token, score, normalize))
    hidden = hidden or dim
    self.activation = activation
    self.w_in_DX = matrix(rngs, (dim, hidden), INTO, init_scale)
    self.w_out_XE = matrix(rngs, (hidden, num_experts), OUT, init_scale)

  def logits(self, x_GTD: Array) -> Array:
    hidden_GTX = ACTIVATIONS[self.activation](project(x_GTD, weight(self.w_in_DX)))
    return constrain(project(hidden_GTX, weight(self.w_out_XE)), ("group", None, None))


class Gemma4TopK(LinearRouter):
  """The router of Gemma 4, as in the released code (transformers, `Gemma4TextRouter`).

  Its input is x / rms(x) * a / sqrt(D) with a learned vector a. Scores are the softmax of its product with a matrix.
  Weights are the K best scores divided by their sum, each times a learned scale of its expert. Both a and the scales
  start at 1.

  In Gemma 4 the router reads the residual stream, and the experts a normed copy of it. Here both read the layer's
  input, which a block has normed: for the router, that differs by the learned scale of the block's norm. The dense
  part beside the experts is `--ffn=parallel_moe`.
  """

  def __init__(
    self,
    dim: int,
    num_experts: int,
    num_experts_per_token: int,
    *,
    eps: float = 1e-6,
    init_scale: float = 1.0,
    rngs: nnx.Rngs,
  ):
    choice = scored_topk("gemma4_topk", num_experts_per_token)
    super().__init__(choice, dim, num_experts, init_scale, rngs=rngs)
    self.eps = eps
    self.scale_D = vector(jnp.ones(dim), ("norm",))
    self.scale_E = vector(jnp.ones(num_experts), ("router",))

  def logits(self, x_GTD: Array) -> Array:
    inverse_rms_GT1 = jax.lax.rsqrt(jnp.mean(x_GTD * x_GTD, axis=-1, keepdims=True) + self.eps)
    scale_D = self.scale_D[...] * x_GTD.shape[-1] ** -0.5
    return super().logits(x_GTD * inverse_rms_GT1 * scale_D[None, None])

  def from_logits(self, logits_GTE: Array, context: RouterContext) -> Routing:
    routing = super().from_logits(logits_GTE, context)
    assignment = routing.assignment
    # A comparison and a sum, whose gradient needs no scatter.
    is_expert_GAE = assignment.expert_A[..., None] == jnp.arange(logits_GTE.shape[-1])[None, None]
    scale_GA = jnp.sum(jnp.where(is_expert_GAE, self.scale_E[...][None, None], 0), axis=-1)
    return routing._replace(assignment=assignment._replace(weight_A=assignment.weight_A * scale_GA))
