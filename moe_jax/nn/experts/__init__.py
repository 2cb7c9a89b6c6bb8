"""Networks of experts. `EXPERTS` has all of them by name."""

from moe_jax.nn.experts.base import ExpertNetwork, as_experts
from moe_jax.nn.experts.bounded_swiglu import BoundedSwiGLU
from moe_jax.nn.experts.clipped_swiglu import ClippedSwiGLU
from moe_jax.nn.experts.dropout import ExpertDropout
from moe_jax.nn.experts.fp8_products import FP8Products
from moe_jax.nn.experts.low_rank import LowRankExperts
from moe_jax.nn.experts.plain import GELU, ReLU
from moe_jax.nn.experts.quantised import QuantisedExperts, QuantisedTraining
from moe_jax.nn.experts.swiglu import SwiGLU
from moe_jax.registry import Registry

EXPERTS = Registry(
  "experts",
  {
    "swiglu": SwiGLU,
    "relu": ReLU,
    "gelu": GELU,
    "clipped_swiglu": ClippedSwiGLU,
    "bounded_swiglu": BoundedSwiGLU,
    "expert_dropout": ExpertDropout,
    "low_rank": LowRankExperts,
    "quantised": QuantisedExperts,
    "quantised_training": QuantisedTraining,
    "fp8_products": FP8Products,
  },
  offered=("num_experts", "dim", "expert_dim", "init_scale", "rngs"),
  wraps="experts",
)

__all__ = ["EXPERTS", "ExpertNetwork", "as_experts"]
