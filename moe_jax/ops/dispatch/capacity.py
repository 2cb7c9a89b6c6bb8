"""The capacity of an expert, and the size of the groups that share it."""

import math
from fractions import Fraction

# The einsum dispatcher multiplies T*E*C = T^2*K*factor zeros and ones per group, so its cost per token grows
# with T. On CPU with D=256, F=512, E=16, K=2, groups of 128 tokens were fastest (scripts/bench_layer.py).
EINSUM_GROUP_SIZE = 128


def expert_capacity(
  num_tokens: int, num_experts_per_token: int | Fraction, capacity_factor: float, num_experts: int
) -> int:
  """Returns the slots of one expert in one group: `ceil(T*K*factor/E)`, at least 1.

  The result is exact, because the factor is converted to the fraction that its decimals represent. For example,
  10 tokens at factor 1.1 have 11 slots, although 10*1.1 is 11.000000000000002 in floating point. 3*0.1 is 3/10.
  """
  factor = Fraction(capacity_factor).limit_denominator(10**6)
  return max(1, math.ceil(num_tokens * num_experts_per_token * factor / num_experts))


def default_group_size(small_groups: bool, sequence_length: int) -> int:
  """Returns the number of tokens per routing group, a divisor of L.

  It depends only on the shape, never on the number of devices. Groups never span sequences, so results do not depend
  on how a batch is split. A group is a whole sequence or, with `small_groups` (for a dispatcher whose cost per token
  grows with the group), the smallest divisor of L that is at least 128.
  """
  if not small_groups:
    return sequence_length
  at_least = min(EINSUM_GROUP_SIZE, sequence_length)
  return next(size for size in range(at_least, sequence_length + 1) if sequence_length % size == 0)
