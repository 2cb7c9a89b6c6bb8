"""Positions, and the YaRN options that mixers have in common."""

import jax
import jax.numpy as jnp

from moe_jax.errors import InputError
from moe_jax.nn.context import Context
from moe_jax.ops.rotary import Yarn
from moe_jax.types import Array


def sequence_positions(x_BLD: Array, context: Context) -> Array:
  """Returns the positions in whole sequences, int32 [1, L]; in packed rows, those in each text, [B, L]."""
  place_1L = jnp.arange(x_BLD.shape[1], dtype=jnp.int32)[None]
  segment_BL = context.segment_BL
  if segment_BL is None:
    return place_1L
  begins_BL = jnp.pad(segment_BL[:, 1:] != segment_BL[:, :-1], ((0, 0), (1, 0)))
  return place_1L - jax.lax.cummax(jnp.where(begins_BL, place_1L, 0), axis=1)


def make_yarn(
  mixer: str,
  factor: float,
  length: int,
  beta_fast: float,
  beta_slow: float,
  truncate: bool,
  mscale: float,
  mscale_all_dim: float,
) -> Yarn | None:
  """Returns the record of a mixer's options, or None for a factor of 1.

  Raises:
    InputError: if an option is out of range. The message names the mixer.
  """
  values = {"factor": factor, "length": length, "beta_fast": beta_fast, "beta_slow": beta_slow}
  for name, least in (("factor", 1), ("length", 1), ("beta_fast", beta_slow)):
    if values[name] < least:
      raise InputError(f"mixer {mixer}: yarn_{name} must be at least {least}, got {values[name]}")
  if beta_slow <= 0:
    raise InputError(f"mixer {mixer}: yarn_beta_slow must be above 0, got {beta_slow}")
  if factor == 1:
    return None
  return Yarn(**values, truncate=truncate, mscale=mscale, mscale_all_dim=mscale_all_dim)
