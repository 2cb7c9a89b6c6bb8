"""The arms that the comparisons run. An arm is a set of fields of the configuration.

Every balancer and every router of the registries must be in one of the two tables, which
tests/comparison/test_arms.py checks. `PUBLISHED` has weights in the convention of their source; the others are
plain numbers in ours (docs/coefficients.md).
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from moe_jax.config import Config, MoEConfig
from moe_jax.errors import InputError, unknown_name
from moe_jax.nn.build import num_routed_layers, resolve
from moe_jax.nn.routers import ROUTERS
from moe_jax.ops.balancing import BALANCERS
from moe_jax.ops.balancing.conventions import convert

Arm = Mapping[str, Any]

_PARTS = ("model", "optimizer", "data", "train")  # whose fields an arm may set, beside those of model.moe


def with_arm(config: Config, arm: Arm) -> Config:
  """Returns `config` with the fields of `arm`.

  Each field is found by its name in any part of the configuration.

  Raises:
    InputError: if no part of the configuration has a field of that name.
  """
  given: dict[str, dict[str, Any]] = {part: {} for part in ("moe", *_PARTS)}
  for field, value in arm.items():
    given[_part_of(config, field)][field] = value
  moe = dataclasses.replace(config.model.moe, **given.pop("moe"))
  parts = {part: dataclasses.replace(getattr(config, part), **fields) for part, fields in given.items()}
  parts["model"] = dataclasses.replace(parts["model"], moe=moe)
  return dataclasses.replace(config, **parts)


def value_of(config: Config, field: str) -> Any:
  """Returns the value of the field of that name, in any part of the configuration."""
  part = _part_of(config, field)
  return getattr(config.model.moe if part == "moe" else getattr(config, part), field)


def _part_of(config: Config, field: str) -> str:
  parts = {"moe": config.model.moe} | {part: getattr(config, part) for part in _PARTS}
  names = {part: [f.name for f in dataclasses.fields(value)] for part, value in parts.items()}
  found = next((part for part in parts if field in names[part]), None)
  if found is None:
    raise unknown_name("field of an arm", field, [name for part in names.values() for name in part])
  return found


def balancing_arm(text: str) -> Arm:
  """Returns the arm for `"switch_loss:0.01+z_loss:0.001"` or, with a router, `"load_loss:0.1@noisy_topk"`."""
  balancers, at, router = text.partition("@")
  if not at and (name := text.partition(":")[0]) in ROUTERS and name not in BALANCERS:
    raise InputError(f"arm {text}: {name} is a router; with no balancer, it is none@{text}")
  return {"balancers": balancers} | ({"router": router} if at else {})


def routing_arm(text: str) -> Arm:
  """Returns the arm for `"sigmoid_topk:normalize=true"` or, with its own balancers, `"sinkhorn@none"`."""
  router, at, balancers = text.partition("@")
  if not at and (name := text.partition(":")[0]) in BALANCERS and name not in ROUTERS:
    raise InputError(f"arm {text}: {name} is a balancer; behind a router, it is ROUTER@{text}")
  return {"router": router} | ({"balancers": balancers} if at else {})


def arms_from_flag(
  flag: str, text: str, every: Mapping[str, Arm], parse: Callable[[str], Arm]
) -> dict[str, Arm]:
  """Returns the arms that a flag names.

  Args:
    flag: the name of the flag, for errors.
    text: `all`, or names separated by commas.
    every: the arms with names of their own.
    parse: makes an arm of any other name.

  Raises:
    InputError: if no arm is named, or one is named twice.
  """
  names = ["".join(name.split()) for name in text.split(",") if name.strip()]  # spaces make no other arm
  if names == ["all"]:
    return dict(every)
  if not names:
    raise InputError(f"--{flag}=: name at least one arm, e.g. --{flag}={','.join(list(every)[:2])}")
  if len(set(names)) < len(names):
    raise InputError(f"--{flag}={text}: an arm is named twice")
  return {name: every[name] if name in every else parse(name) for name in names}


@dataclasses.dataclass(frozen=True)
class Published:
  """A balancing loss with the weight of its source, in the convention of the source."""

  balancer: str  # a name, and the options after the weight
  weight: float
  convention: str  # a name in `moe_jax.ops.balancing.conventions`
  source: str
  loss: str = "load_balancing"

  def spec(self, moe: MoEConfig, num_layers: int) -> str:
    """Returns the balancer with the weight that is equivalent here."""
    weight = convert(
      self.weight,
      self.convention,
      "moe_jax",
      num_experts=moe.num_experts,
      num_experts_per_token=moe.num_experts_per_token,
      num_layers=num_layers,
      loss=self.loss,
    )
    name, colon, options = self.balancer.partition(":")
    return f"{name}:{weight:.6g}{colon}{options}"

  def note(self, name: str, moe: MoEConfig, num_layers: int) -> str:
    """Returns a sentence for the report."""
    return (
      f"{name}: {self.weight:g} in the convention of {self.convention} ({self.source}), here "
      f"{self.spec(moe, num_layers)}."
    )


# Arms whose balancers are losses of one paper. The converter makes our weights of them.
PUBLISHED: dict[str, tuple[Published, ...]] = {
  "switch": (Published("switch_loss", 0.01, "switch", "2101.03961, section 2.2"),),
  "deepseek_moe": (Published("switch_loss", 0.01, "deepseek", "2401.06066, the 2B model"),),
  "loss_free_baseline": (
    Published("switch_loss", 0.001, "deepseek", "2408.15664, the baseline with a loss"),
  ),
  "mixtral": (Published("switch_loss", 0.02, "hugging_face", "router_aux_loss_coef of Mixtral-8x7B"),),
  "olmoe": (
    Published("switch_loss", 0.01, "megablocks", "OLMoE, 2409.02060"),
    Published("z_loss", 0.001, "megablocks_fork", "OLMoE, 2409.02060", loss="z"),
  ),
  "st_moe": (
    Published("st_moe_loss", 0.01, "mesh_tensorflow", "2202.08906"),
    Published("z_loss", 0.001, "megatron_lm", "2202.08906, whose z-losses add up", loss="z"),
  ),
}

# Balancing arms with options of ours.
BALANCING: dict[str, Arm] = {
  text: balancing_arm(text)
  for text in (
    "none",
    "none@sigmoid_topk",
    "switch_loss:0.01",
    "switch_loss:0.01:scope=sequence",
    "switch_loss:0.01+z_loss:0.001",
    "gshard_loss:0.01",
    "st_moe_loss:0.01",
    "device_loss:0.05",
    "squared_deviation_loss:0.01",
    "squared_deviation_loss:0.01:of=load",
    "adaptive_loss:0.01",
    "loss_free_bias:0.001@sigmoid_topk",
    "loss_free_bias:0.001",
    "loss_free_bias:0.001:rule=proportional",
    "multiplicative_bias:0.01",
    "smebu:0.001@sigmoid_topk",
    "quantile_balancing",
    "quantile_balancing:cutoff=quantile",
    "quantile_balancing:ema=0.9",
  )
} | {
  "shazeer": balancing_arm("importance_loss:0.1+load_loss:0.1@noisy_topk"),
  "vmoe": balancing_arm("importance_loss:0.005:group:scores+load_loss:0.005:group@vmoe_topk"),
  "expert_threshold": balancing_arm("expert_threshold@expert_threshold") | {"dispatcher": "dropless"},
  "dynamic": balancing_arm("switch_loss:0.01+entropy_loss:0.0001@top_p") | {"num_experts_per_token": 4},
  "moe_plus_plus": balancing_arm("heterogeneous_loss:0.01@moe_plus_plus"),
  "remoe": balancing_arm("remoe_loss@remoe") | {"dispatcher": "dropless"},
  "longcat": balancing_arm("longcat_bias@longcat_topk:scale=1"),
  # the published scales of the weights, 16 and 2.5, are for 160 and 256 experts
  "deepseek_v2": balancing_arm(
    "switch_loss:0.003:scope=sequence+device_loss:0.05:devices=8+communication_loss:0.02@device_limited_topk:scale=1"
  ),
  "deepseek_v3": balancing_arm("loss_free_bias:0.001+sequence_loss:0.0001@node_limited_topk:scale=1"),
}


def balancing(config: Config) -> dict[str, Arm]:
  """Returns the arms of `experiments/load_balancing.py` that have names, `--methods=all`."""
  moe, layers = config.model.moe, num_routed_layers(resolve(config.model))
  published = {}
  if layers:  # a model without routers has no loss whose weight could be converted
    published = {
      name: {"balancers": ",".join(p.spec(moe, layers) for p in losses)} for name, losses in PUBLISHED.items()
    }
  return BALANCING | published | {"hash_topk": routing_arm("hash_topk@none")} | dense_models(moe)


def published_notes(names: Iterable[str], config: Config) -> list[str]:
  """Returns a sentence for each loss of these arms that has a weight of its source."""
  moe, layers = config.model.moe, num_routed_layers(resolve(config.model))
  return [p.note(name, moe, layers) for name in names for p in PUBLISHED.get(name, ())]


def dense_models(moe: MoEConfig) -> dict[str, Arm]:
  """Returns models without routing: `dense` has the active width of `moe`, `dense_total` the width of all experts."""
  one = {
    "router": "softmax_topk:softmax=before",
    "balancers": "none",
    "num_experts": 1,
    "num_experts_per_token": 1,
  }
  return {
    "dense": one | {"expert_dim": moe.num_experts_per_token * moe.expert_dim},
    "dense_total": one | {"expert_dim": moe.num_experts * moe.expert_dim},
  }


def granularity(moe: MoEConfig) -> dict[str, Arm]:
  """Returns the arms of `experiments/granularity.py`. The first is `moe` itself, the baseline.

  A name is ExF_topK, with `_plus` the number of shared experts. K x F is equal in all, shared experts included.
  """
  e, f, k = moe.num_experts, moe.expert_dim, moe.num_experts_per_token
  shapes = [(e, f, k, 0)]
  # coarser and finer: E x F is equal, too
  shapes += [(e * n // d, f * d // n, k * n // d, 0) for n, d in ((1, 2), (2, 1), (4, 1), (8, 1))]
  # fewer and more
  shapes += [(e * n // d, f, k, 0) for n, d in ((1, 2), (2, 1), (4, 1), (8, 1))]
  # shared: one of K, and a quarter of the finer ones
  shapes += [(e - 1, f, k - 1, 1), (4 * e - k, f // 4, 4 * k - k, k)]
  possible = [
    shape for shape in dict.fromkeys(shapes) if all(shape[:3]) and shape[1] * (shape[2] + shape[3]) == k * f
  ]
  return {
    f"{e}x{f}_top{k}" + (f"_plus{shared}" if shared else ""): {
      "num_experts": e,
      "expert_dim": f,
      "num_experts_per_token": k,
      "num_shared_experts": shared,
    }
    for e, f, k, shared in possible
  }


def routers(moe: MoEConfig) -> dict[str, Arm]:
  """Returns the arms of `experiments/routers.py --routers=all`.

  K x F, the active hidden width, is that of `moe` in all but `top_p`, `remoe`, `expert_threshold`, `soft_moe` and
  `latent_moe`; those that differ have no verdict. `task_level` reads the domain of each sequence. `task_level` and
  `sequence_level` drop nothing.
  """
  wide = {"num_experts_per_token": 1, "expert_dim": moe.num_experts_per_token * moe.expert_dim}
  # All tokens of a sequence have the same experts, so a capacity would drop most of them.
  dropless = {"dispatcher": "dropless"}
  return (
    {text.partition("@")[0]: routing_arm(text) for text in _CAUSAL}
    | {text.partition("@")[0]: _accepted(routing_arm(text)) for text in _LEAKING}
    | {
      "switch_top1": routing_arm("switch_top1") | wide,
      "dense": dense_models(moe)["dense"],
      "llama4_topk": routing_arm("llama4_topk") | wide,
      "top_p": routing_arm("top_p") | {"num_experts_per_token": 4},
      # It starts with half of the experts, which a capacity for K would drop.
      "remoe": routing_arm("remoe@remoe_loss") | dropless,
      "task_level": routing_arm("task_level") | dropless,
      "sequence_level": _accepted(routing_arm("sequence_level") | dropless),
      "base_assignment": _accepted(routing_arm("base_assignment@none") | wide),
      "expert_threshold": routing_arm("expert_threshold@expert_threshold") | dropless,
      "token_rounding": _accepted(routing_arm("token_rounding:tile=8") | dropless),
      "default_moe": {"ffn": "default_moe", "router": "softmax_topk:softmax=before"},
      "erc_moe": {"ffn": "erc_moe"},
      "latent_moe": {"ffn": "latent_moe"},
      "soft_moe": {"ffn": "soft_moe", "balancers": "none", "accept_leaks": "soft_moe"},
    }
  )


_CAUSAL = (
  "softmax_topk",
  "softmax_topk:softmax=before",
  "sqrt_softplus_topk",
  "sigmoid_topk@loss_free_bias:0.001",
  "noisy_topk@importance_loss:0.1+load_loss:0.1",
  "vmoe_topk@importance_loss:0.005:group:scores+load_loss:0.005:group",
  "hierarchical_topk:groups_per_token=1",
  "group_limited_topk@loss_free_bias:0.001",
  "device_limited_topk:scale=1",
  "node_limited_topk:scale=1@loss_free_bias:0.001",
  "grouped_topk",
  "cosine_topk",
  "mlp_topk",
  "gemma4_topk",
  "gpt_oss_topk",
  "moe_plus_plus@heterogeneous_loss:0.01",
  "longcat_topk:scale=1@longcat_bias",
  "hash_topk@none",
  "frozen_table_topk@none",
)
# These look at later tokens, so in a causal model their perplexity is not that of a language model.
_LEAKING = (
  "gshard_top2",
  "gshard_top2:threshold=0.2:slots=sent",
  "st_moe_topn",
  "batch_prioritized",
  "topology_aware_topk",
  "expert_choice@none",
  "sinkhorn@none",
  "quantile_topk@none",
)


def _accepted(arm: Arm) -> Arm:
  """Returns `arm` with permission for its router to look at later tokens."""
  return dict(arm) | {"accept_leaks": arm["router"].partition(":")[0]}
