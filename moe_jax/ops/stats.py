"""Routing statistics: load, MaxVio, entropy, drops, dead experts, specialisation.

All functions take counts and return ratios. Counts may have leading axes, for example one for layers. The average
of ratios over batches is not the ratio over the whole set, so sum the counts over batches first.
"""

import jax.numpy as jnp

from moe_jax.types import Array

DEAD_LOAD_FRACTION = 0.01  # of the fair share 1/E


def load(tokens_per_expert_E: Array) -> Array:
  """Returns fractions [..., E] that sum to 1, or all 0 if nothing was counted."""
  return tokens_per_expert_E / jnp.maximum(tokens_per_expert_E.sum(axis=-1, keepdims=True), 1)


def max_vio(tokens_per_expert_E: Array) -> Array:
  """max(load) / mean(load) - 1, signed (2408.15664): 0 if balanced, E/K - 1 if collapsed. [...]"""
  mean = tokens_per_expert_E.mean(axis=-1)
  return jnp.where(mean > 0, tokens_per_expert_E.max(axis=-1) / jnp.where(mean > 0, mean, 1) - 1, 0.0)


def entropy(probs: Array) -> Array:
  """-sum p log p over the last axis, in nats, with 0 log 0 = 0. NaN where a probability is."""
  return -jnp.sum(jnp.where(probs <= 0, 0, probs * jnp.log(jnp.where(probs <= 0, 1, probs))), axis=-1)


def load_entropy(tokens_per_expert_E: Array) -> Array:
  """Entropy of the load / log E: 1 if balanced, log K / log E if collapsed, 1 for a single expert. [...]"""
  num_experts = tokens_per_expert_E.shape[-1]
  if num_experts == 1:
    return jnp.ones(tokens_per_expert_E.shape[:-1])
  return entropy(load(tokens_per_expert_E)) / jnp.log(num_experts)


def dropped_fraction(tokens_per_expert_E: Array, kept_per_expert_E: Array) -> Array:
  """Assignments dropped by capacity / assignments before capacity. [...]"""
  wanted = tokens_per_expert_E.sum(axis=-1)
  return (wanted - kept_per_expert_E.sum(axis=-1)) / jnp.maximum(wanted, 1)


def dead_experts(tokens_per_expert_E: Array, threshold: float = DEAD_LOAD_FRACTION) -> Array:
  """Number of experts whose load is below `threshold` times the fair share 1/E. [...]"""
  num_experts = tokens_per_expert_E.shape[-1]
  return jnp.sum(load(tokens_per_expert_E) * num_experts < threshold, axis=-1)


def mutual_information(tokens_per_expert_SE: Array) -> Array:
  """I(domain; expert) in nats from joint counts [..., S, E]: 0 means experts ignore the domain.

  Each domain is weighted by its share of assignments. This is a plug-in estimate, biased upward by about
  (S-1)(E-1) / (2 * assignments). The bias is negligible for more than a few thousand tokens.
  """
  total = jnp.maximum(tokens_per_expert_SE.sum(axis=(-2, -1), keepdims=True), 1)
  joint_SE = tokens_per_expert_SE / total
  domain_S = joint_SE.sum(axis=-1)
  expert_E = joint_SE.sum(axis=-2)
  joint = entropy(joint_SE.reshape(*joint_SE.shape[:-2], -1))
  return jnp.maximum(entropy(domain_S) + entropy(expert_E) - joint, 0)  # rounding may leave it just below 0
