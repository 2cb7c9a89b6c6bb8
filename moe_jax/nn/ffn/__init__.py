"""Feed-forward parts of a block. `FFNS` has all of them by name, and `SHARED_EXPERTS` the networks of shared experts.

A part is a module that maps (x_BLD, context) to (y_BLD, aux), where aux is a `MoEAux` or None. Its factory
takes what it needs of the model by name. `moe` is the `MoEConfig` of the block.
"""

from typing import Any, TypeVar

from flax import nnx

from moe_jax.config import MoEConfig
from moe_jax.errors import InputError
from moe_jax.nn.ffn.default_moe import DefaultMoE
from moe_jax.nn.ffn.erc_moe import CoupledMoE
from moe_jax.nn.ffn.latent_moe import LatentMoE
from moe_jax.nn.ffn.low_rank import LowRankFFN
from moe_jax.nn.ffn.mlp import MLP, GatedMLP
from moe_jax.nn.ffn.parallel_moe import ParallelMoE
from moe_jax.nn.ffn.soft_moe import SoftMoE
from moe_jax.nn.moe import MoE
from moe_jax.registry import Registry, Spec, as_inner, inner_spec

Layer = TypeVar("Layer", bound=MoE)


def always_on(
  dim: int, dense_dim: int, activation: str, gate: bool, init_scale: float, rngs: nnx.Rngs
) -> MLP:
  """Returns the plain network of shared experts; with `gate`, each token scales its output."""
  return (GatedMLP if gate else MLP)(dim, dense_dim, activation, init_scale=init_scale, rngs=rngs)


def always_on_low_rank(
  dim: int,
  dense_dim: int,
  activation: str,
  gate: bool,
  init_scale: float,
  rngs: nnx.Rngs,
  rank: int = 8,
  alpha: float = 16.0,
  ffn: Spec = "mlp",
) -> LowRankFFN:
  """Returns the network `ffn` of shared experts, frozen, with low-rank adapters (LoRA, 2106.09685)."""
  offered = {"dim": dim, "dense_dim": dense_dim, "activation": activation, "gate": gate}
  inner = SHARED_EXPERTS.resolve(inner_spec(ffn))(**offered, init_scale=init_scale, rngs=rngs)
  return LowRankFFN(inner, rank, alpha, f"shared_experts low_rank:ffn={as_inner(ffn)}", rngs=rngs)


SHARED_EXPERTS = Registry(
  "shared experts",
  {"mlp": always_on, "low_rank": always_on_low_rank},
  offered=("dim", "dense_dim", "activation", "gate", "init_scale", "rngs"),
  wraps="ffn",
)


def shared_experts(
  moe: MoEConfig, dim: int, activation: str, init_scale: float, rngs: nnx.Rngs
) -> nnx.Module | None:
  """Returns the shared experts as one network of their summed width, or None if there are none."""
  width = moe.shared_width
  if not width:
    return None
  offered = {"dim": dim, "dense_dim": width, "activation": activation, "gate": moe.shared_expert_gate}
  return moe.shared_experts(**offered, init_scale=init_scale, rngs=rngs)


def moe(moe: MoEConfig, dim: int, activation: str, init_scale: float, rngs: nnx.Rngs) -> MoE:
  """Returns the layer that routes tokens to experts, with its shared experts."""
  return _routed(MoE, moe, dim, activation, init_scale, rngs)


def latent_moe(
  moe: MoEConfig, dim: int, activation: str, init_scale: float, rngs: nnx.Rngs, latent_dim: int = 0
) -> LatentMoE:
  """Returns routed experts of width `latent_dim` (0: half of the model's) between two projections."""
  return _routed(LatentMoE, moe, dim, activation, init_scale, rngs, latent_dim=latent_dim or dim // 2)


def default_moe(
  moe: MoEConfig, dim: int, activation: str, init_scale: float, rngs: nnx.Rngs, beta: float = 0.95
) -> DefaultMoE:
  """Returns routed experts that are replaced by their mean output where a token does not reach them."""
  return _routed(DefaultMoE, moe, dim, activation, init_scale, rngs, beta=beta)


def erc_moe(
  moe: MoEConfig,
  dim: int,
  activation: str,
  init_scale: float,
  rngs: nnx.Rngs,
  weight: float = 1.0,
  alpha: float = 1.0,
) -> CoupledMoE:
  """Returns routed experts with the loss that couples them to the router."""
  return _routed(CoupledMoE, moe, dim, activation, init_scale, rngs, weight=weight, alpha=alpha)


def _routed(
  kind: type[Layer],
  moe: MoEConfig,
  dim: int,
  activation: str,
  init_scale: float,
  rngs: nnx.Rngs,
  **options: Any,
) -> Layer:
  fields = ("num_experts", "num_experts_per_token", "expert_dim", "router", "experts", "dispatcher")
  fields += ("capacity_factor", "eval_capacity_factor", "group_size", "jitter")
  options |= {name: getattr(moe, name) for name in fields}
  layer = kind(dim, balancer=moe.balancers, init_scale=init_scale, rngs=rngs, **options)
  layer.shared = shared_experts(moe, dim, activation, init_scale, rngs)
  return layer


def parallel_moe(
  moe: MoEConfig, dim: int, dense_dim: int, activation: str, init_scale: float, rngs: nnx.Rngs
) -> ParallelMoE:
  """Returns routed experts in parallel with a dense part of width `dense_dim`, as in Gemma 4."""
  experts = FFNS["moe"](moe, dim, activation, init_scale, rngs)
  return ParallelMoE(experts, MLP(dim, dense_dim, activation, init_scale=init_scale, rngs=rngs))


def soft_moe(
  moe: MoEConfig, dim: int, activation: str, init_scale: float, rngs: nnx.Rngs, slots: int = 1
) -> SoftMoE:
  """Returns a Soft MoE layer (2308.00951) with `slots` slots per expert."""
  sizes: dict[str, Any] = {"num_experts": moe.num_experts, "expert_dim": moe.expert_dim}
  layer = SoftMoE(dim, **sizes, slots=slots, experts=moe.experts, init_scale=init_scale, rngs=rngs)
  layer.shared = shared_experts(moe, dim, activation, init_scale, rngs)
  return layer


def low_rank(
  dim: int,
  dense_dim: int,
  activation: str,
  init_scale: float,
  rngs: nnx.Rngs,
  rank: int = 8,
  alpha: float = 16.0,
  ffn: Spec = "mlp",
) -> LowRankFFN:
  """Returns the part `ffn`, which has no experts, frozen, with low-rank adapters (LoRA, 2106.09685)."""
  method = FFNS.resolve(inner_spec(ffn))
  if method.takes("moe"):
    raise InputError(
      f"ffn low_rank:ffn={as_inner(ffn)}: adapters of experts are --experts=low_rank, and those of shared ones "
      "--shared_experts=low_rank"
    )
  offered = {"dim": dim, "dense_dim": dense_dim, "activation": activation, "init_scale": init_scale}
  return LowRankFFN(method(**offered, rngs=rngs), rank, alpha, f"ffn low_rank:ffn={as_inner(ffn)}", rngs=rngs)


FFNS = Registry(
  "ffn",
  {
    "mlp": MLP,
    "moe": moe,
    "parallel_moe": parallel_moe,
    "latent_moe": latent_moe,
    "default_moe": default_moe,
    "erc_moe": erc_moe,
    "soft_moe": soft_moe,
    "low_rank": low_rank,
  },
  offered=("moe", "dim", "dense_dim", "activation", "init_scale", "rngs"),
  wraps="ffn",
)

__all__ = [
  "FFNS",
  "MLP",
  "SHARED_EXPERTS",
  "CoupledMoE",
  "DefaultMoE",
  "GatedMLP",
  "LatentMoE",
  "LowRankFFN",
  "ParallelMoE",
  "SoftMoE",
]
