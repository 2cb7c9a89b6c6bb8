"""Positions, and the YaRN options that mixers have in common."""

import jax.numpy as jnp

from moe_jax.errors import InputError
from moe_jax.ops.rotary import Yarn
from moe_jax.types import Array


def sequence_positions(x_BLD: Array) -> Array:
  """Returns the positions of whole sequences, int32 [1, L]."""
  return jnp.arange(x_BLD.shape[1], dtype=jnp.int32)[None]


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
