"""Axis letters, and the records that cross module borders.

Axes have one letter each everywhere, as name suffixes and in einsum strings. A letter has one meaning in
the whole package (tests/test_axis_letters.py):

  B batch                            L sequence
  T tokens of one routing group      G groups
  D model                            F expert hidden
  E experts                          K experts per token
  C capacity (slots of one expert in one group)
  A assignments, pairs of token and expert
  N heads (of queries, or of keys and values)
  H head dim                         V vocabulary
  R layers with routed experts       S domains
  U units that a loss balances over  Q bins of a histogram
  P parts that the experts are cut into: devices, nodes, groups of experts
  O experts of one part              W parts that a token uses
  M rows sorted by expert            Z zero-computation experts
  J pieces of a step: chunks, micro-batches
  I recorded steps
  X, Y any axis

A digit is an axis of that length: `mask_11XL`. Suffixes name logical axes, never the sharding. Flattening
B*L tokens in order and cutting them into G groups of T tokens gives the group layout: `x_BLD.reshape(G, T, D)`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
PyTree = Any


class Assignment(NamedTuple):
  """Who goes where: a static-length list of (token, expert) pairs, highest priority first.

  The order is the order in which expert slots are given out: where capacity runs out, the later
  entries drop. Entries of one expert keep their relative order in every dispatcher.
  """

  token_A: Array  # int32, index into the group's T tokens
  expert_A: Array  # int32, in [0, E), also for invalid entries
  weight_A: Array  # float32, the combine weight; differentiable
  valid_A: Array  # bool, False: not sent anywhere (padding, or not chosen)
  # bool, True: counts against the expert's capacity. Differs from valid_A only for GShard, whose
  # randomly skipped second choices leave their slot empty. None means "the same as valid_A".
  holds_slot_A: Array | None = None


class RouterContext(NamedTuple):
  """What a router may read besides the activations.

  A router module gets fields of all groups, [G, T]; the pure choice of one group gets its own, [T].
  """

  mask: Array  # bool [G, T], False: padding, which is sent nowhere and takes no capacity
  # float32 or an `ExpertScale`, of a balancer: moves the choice of experts, never a weight
  bias_E: Any = None
  key: Array | None = None  # [G] random keys; None: choose without drawing, as in evaluation
  token_id: Array | None = None  # int32 [G, T], vocabulary ids
  sequence: Array | None = None  # int32 [G, T], which of the group's sequences the token belongs to
  domain: Array | None = None  # int32 [G, T], the domain of the token's sequence
  layer_input: Array | None = None  # [G, T, D], what the experts see: of any float type, and never jittered
  train: bool = False  # static, for methods that choose differently in evaluation
  routes: Array | None = None  # [G, T, E], the choices to take instead of own ones: see `Replay`


class Routing(NamedTuple):
  """What a router decides. Of one group of T tokens; with a leading G in every field, of all groups."""

  logits_TE: Array  # float32, before any bias
  # float32, log of the softmax, sigmoid, ... of the logits; never includes the expert bias. Logarithms,
  # because a sigmoid below exp(-87) is 0 in float32, and the ratios of such scores still mean something.
  log_scores_TE: Array
  mask_T: Array  # bool, False: padding, which neither counts nor takes capacity
  # Its experts may lie beyond those that have a network: such entries count and are never dispatched, for the
  # router has served them itself, in `direct_TD`.
  assignment: Assignment
  # float32, differentiable: the probability that noise would send the token to the expert (1701.06538, eq. 9)
  smooth_load_TE: Array | None = None
  direct_TD: Array | None = None  # differentiable: what the router adds to the layer's output by itself

  @property
  def scores_TE(self) -> Array:
    return jnp.exp(self.log_scores_TE)


class ExpertOutputs(NamedTuple):
  """What the experts of a layer returned for the tokens that they kept, before any combine weight."""

  sum_ED: Array  # float32, the sum over tokens
  tokens_E: Array  # float32, the number of these tokens


class BatchRouting(NamedTuple):
  """One layer's routing of one micro-batch in the batch layout: what balancers and statistics read."""

  logits_BLE: Array  # float32
  log_scores_BLE: Array  # float32
  selected_BLE: Array  # float32, 1 where the token was sent to the expert, before capacity; no gradient
  mask_BL: Array  # bool
  group_size: int  # T, static: B*L tokens in order are cut into groups of T
  num_experts_per_token: int  # K, static
  smooth_load_BLE: Array | None = None  # see `Routing`
  # float32, differentiable: the combine weight of each chosen expert, before capacity; 0 for all others
  weights_BLE: Array | None = None
  outputs: ExpertOutputs | None = None  # only where the layer measures them; no gradient

  @property
  def scores_BLE(self) -> Array:
    return jnp.exp(self.log_scores_BLE)


class Replay(NamedTuple):
  """Stands for the bias of a balancer where choices are given: a router takes these experts, weighed by live scores."""

  selected_TE: Array  # 1 where a token was sent to an expert; 0 everywhere for padding


class ExpertScale(NamedTuple):
  """A bias that multiplies: where a router adds `bias_E` to its scores, it multiplies them by this."""

  factor_E: Array  # float32, above 0


class StepStats(NamedTuple):
  """What balancers observed, as a loss may need it. Each is a sum of `Balancer.observe`."""

  whole: PyTree  # over the whole optimizer step: all micro-batches, all devices
  so_far: PyTree  # over the micro-batches of the step up to and including this one


class Maximum(NamedTuple):
  """A leaf of an aux tree of which micro-batches have the largest value together, where other leaves add up."""

  value: Array


class MixerAux(NamedTuple):
  """What attention knows besides its output, where `Context.record_scores` asks for it."""

  largest_score_N: (
    Maximum  # float32: of each query head, over all positions that attend to each other; no sink
  )


class MoEAux(NamedTuple):
  """What a feed-forward part with experts knows besides its output. Every array but the logits is a sum over tokens,
  so it adds over micro-batches and devices; losses are means over the micro-batch's valid tokens, weights included."""

  losses: dict[str, Array]  # name -> scalar
  balancer_stats: PyTree  # sum of the balancer's `observe`; None where nothing is balanced
  tokens_per_expert_BE: Array  # float32 counts before capacity, per sequence
  kept_per_expert_E: Array  # float32 counts after capacity
  metrics: dict[str, PyTree]  # name -> sums, see `moe_jax.ops.metrics`
  # None unless asked for, and no sums: what the router decided by, and 1 where it sent a token to an expert
  logits_BLE: Array | None = None
  selected_BLE: Array | None = None

  @property
  def loss(self) -> Array | float:
    """All balancing losses of the layer, to be added to what a model is trained for."""
    return sum(self.losses.values())
