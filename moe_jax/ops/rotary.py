"""Rotary positions (2104.09864), on all or the first part of a head, and stretched to longer texts by YaRN."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from moe_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Yarn:
  """YaRN (2309.00071): slow pairs turn `factor` times slower, fast ones as before, and those between by a ramp.

  With m(s) = 0.1 s ln(factor) + 1, cosines and sines are multiplied by m(mscale) / m(mscale_all_dim), and the
  scores by m(mscale_all_dim)^2. The defaults are the paper's; DeepSeek sets both to the same (2405.04434,
  section 3.1.4), so that only the scores change, also of what is not rotated.

  Attributes:
    factor: by how much longer texts may be than `length`.
    length: positions of the model before it was stretched.
    beta_fast, beta_slow: pairs that turn more often than beta_fast in `length` positions keep their speed, and
      those that turn less often than beta_slow are slowed down.
    truncate: whether the ends of the ramp are whole pairs. gpt-oss does without.
    mscale, mscale_all_dim: see above.
  """

  factor: float
  length: int
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  truncate: bool = True
  mscale: float = 1.0
  mscale_all_dim: float = 0.0

  def magnitude(self, mscale: float) -> float:
    return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


@dataclasses.dataclass(frozen=True)
class Rotary:
  """How heads are rotated.

  Attributes:
    dim: the first `dim` entries of a head are rotated. Even; 0: none are.
    theta: pair i turns by theta^(-2i / dim) radians per position.
    interleaved: pairs are (2i, 2i + 1) instead of (i, i + dim/2).
    yarn: stretches positions, or None.
  """

  dim: int
  theta: float
  interleaved: bool = False
  yarn: Yarn | None = None

  @property
  def score_scale(self) -> float:
    """What the scale of the scores is multiplied by."""
    return 1.0 if self.yarn is None else self.yarn.magnitude(self.yarn.mscale_all_dim) ** 2

  def frequencies(self) -> Array:
    """Returns the radians per position of each pair, [dim / 2]."""
    half = self.dim // 2
    if self.yarn is None:
      return self.theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    return jnp.asarray(_yarn_frequencies(self.dim, self.theta, self.yarn), jnp.float32)

  def __call__(self, x_BLNH: Array, position_XL: Array) -> Array:
    """Returns the heads, rotated, in the dtype of `x_BLNH`.

    Args:
      x_BLNH: queries or keys of any float dtype.
      position_XL: int32 [B, L], or [1, L] if they are the same in all sequences.
    """
    if not self.dim:
      return x_BLNH
    angle_XLY = position_XL.astype(jnp.float32)[..., None] * self.frequencies()[None, None]
    cos, sin = jnp.cos(angle_XLY)[:, :, None], jnp.sin(angle_XLY)[:, :, None]
    if self.yarn is not None:
      y = self.yarn
      magnitude = y.magnitude(y.mscale) / y.magnitude(y.mscale_all_dim)
      cos, sin = cos * magnitude, sin * magnitude
    turned = x_BLNH[..., : self.dim].astype(jnp.float32)
    a, b = (turned[..., ::2], turned[..., 1::2]) if self.interleaved else jnp.split(turned, 2, axis=-1)
    pair = [a * cos - b * sin, b * cos + a * sin]
    turned = jnp.stack(pair, -1).reshape(turned.shape) if self.interleaved else jnp.concatenate(pair, -1)
    turned = turned.astype(x_BLNH.dtype)
    return turned if self.dim == x_BLNH.shape[-1] else jnp.concatenate([turned, x_BLNH[..., self.dim :]], -1)


def _yarn_frequencies(dim: int, theta: float, yarn: Yarn) -> np.ndarray:
  """2309.00071, section 3.2, with the ramp over pairs as in its released code."""
  pair_of = lambda turns: dim * math.log(yarn.length / (turns * 2 * math.pi)) / (2 * math.log(theta))
  low, high = pair_of(yarn.beta_fast), pair_of(yarn.beta_slow)
  if yarn.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, dim - 1)
  pairs = np.arange(dim // 2)
  slowed = np.clip((pairs - low) / (max(high - low, 0) or 0.001), 0, 1)
  return theta ** (-2 * pairs / dim) * (1 - slowed + slowed / yarn.factor)
