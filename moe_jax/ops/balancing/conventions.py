"""Normalisation conventions of balancing losses in other codebases, and a converter between them.

In this project, a load-balancing loss of weight w equals w x 1 in each layer at perfect balance for every E and
K, because load fractions are over all K choices, and layers add up. Other codebases have w x K, w / K or w / E^2
at balance, and sum or average over layers. A convention is therefore two powers, a factor and a rule for
combining layers.

The conversion is exact if both losses count the same choices (`counts`) and do not pool layers. One loss is
then a constant times the other, and so are their gradients. Otherwise the conversion makes the losses equal at
balance. Coefficients and losses are plain numbers (nats, if added to a language-model loss in nats).
"""

import dataclasses
import math
from collections.abc import Mapping

from moe_jax.errors import InputError, require_option, unknown_name

LAYERS = ("sum", "mean", "pooled", "caller")


@dataclasses.dataclass(frozen=True)
class Convention:
  """How one codebase or paper normalises a loss.

  With coefficient 1, the term of one layer is factor * E^expert_power * K^choice_power at perfect balance. For the
  router z-loss, that factor multiplies the mean over tokens of logsumexp(logits)^2.

  title: a readable name.
  factor: a further constant factor, at the defaults of that codebase.
  setting: the option of that codebase that holds the coefficient.
  layers: how the terms of all layers are combined. sum; mean; pooled: the tokens of all layers form one
    batch, which equals a mean if all layers route alike; caller: one number per layer is returned.
  counts: which choices the load fractions count, all K or only the first. Empty for the z-loss.
  accumulation: how the micro-batches of one optimizer step are combined.
  source: arXiv id, or repository:path.
  checked: which parts of this row were read in that source, and which were not.
  """

  title: str
  setting: str
  layers: str
  source: str
  checked: str
  accumulation: str
  expert_power: int = 0
  choice_power: int = 0
  factor: float = 1.0
  counts: str = ""


_UNSAID = "not stated"
_READ = "formula and layers read"

# Load-balancing losses. The figures in docs/coefficients.md come from here.
CONVENTIONS: Mapping[str, Convention] = {
  "moe_jax": Convention(
    title="moe_jax: switch_loss; gshard_loss counts first choices only",
    setting="--balancers=switch_loss:WEIGHT",
    layers="sum",
    counts="all",
    accumulation="weighted by tokens: equals the whole batch",
    source="moe_jax/ops/balancing/losses.py, moe_jax/training/step.py",
    checked="its own tests",
  ),
  "gshard": Convention(
    title="GShard paper",
    setting="k",
    expert_power=-2,
    layers="sum",
    counts="first",
    accumulation=_UNSAID,
    source="2006.16668, Algorithm 1",
    checked="as documented, not re-read; the paper writes a single l_aux, and summing over layers is our reading",
  ),
  "mesh_tensorflow": Convention(
    title="Mesh-TensorFlow, top_2 gating",
    setting="moe_loss_coef",
    layers="sum",
    counts="first",
    accumulation="divided by their number",
    source="tensorflow/mesh:mesh_tensorflow/transformer/moe.py, transformer.py",
    checked=f"{_READ}, and accumulation",
  ),
  "switch": Convention(
    title="Switch Transformer paper (K = 1)",
    setting="alpha",
    layers="sum",
    counts="first",
    accumulation=_UNSAID,
    source="2101.03961, eq. 4-6 and the sentence before",
    checked=f"{_READ} in a copy of the text",
  ),
  "flaxformer": Convention(
    title="flaxformer, trained by T5X",
    setting="aux_loss_factor",
    choice_power=1,
    layers="mean",
    counts="all",
    accumulation="summed, not divided",
    source="google/flaxformer:flaxformer/architectures/moe/routing.py, google-research/t5x:t5x/contrib/moe/models.py",
    checked=f"{_READ}; accumulation in a copy of t5x/trainer.py",
  ),
  "megatron_lm": Convention(
    title="Megatron-LM",
    setting="--moe-aux-loss-coeff",
    layers="sum",
    counts="all",
    accumulation="divided by their number",
    source="NVIDIA/Megatron-LM:megatron/core/transformer/moe/moe_utils.py, router.py",
    checked=f"{_READ}; accumulation in copies of pipeline_parallel/schedules.py",
  ),
  "maxtext": Convention(
    title="MaxText",
    setting="load_balance_loss_weight",
    choice_power=1,
    layers="mean",
    counts="all",
    accumulation="with accumulation, divided by the tokens of the step, so far too weak",
    source="AI-Hypercomputer/maxtext:src/maxtext/trainers/pre_train/train.py, utils/gradient_accumulation.py",
    checked="layers and accumulation read; formula in copies of layers/moe.py",
  ),
  "levanter": Convention(
    title="Levanter, Mixtral",
    setting="lbl_coef",
    choice_power=-1,
    layers="sum",
    counts="all",
    accumulation="divided by their number",
    source="marin-community/marin:lib/levanter/src/levanter/models/mixtral.py, grad_accum.py",
    checked=f"{_READ}, and accumulation",
  ),
  "olmo_core": Convention(
    title="OLMo-core; its mean includes dense layers; scale_loss_by_num_layers=False sums",
    setting="lb_loss_weight",
    layers="mean",
    counts="all",
    accumulation="divided by the tokens of the step: equals a mean",
    source="allenai/OLMo-core:src/olmo_core/nn/moe/moe.py, router.py, loss.py",
    checked=f"{_READ}, and the divisor",
  ),
  "megablocks": Convention(
    title="MegaBlocks",
    setting="moe_loss_weight",
    layers="mean",
    counts="all",
    accumulation="left to the caller",
    source="databricks/megablocks:megablocks/layers/moe.py",
    checked=_READ,
  ),
  "hugging_face": Convention(
    title="Hugging Face, load_balancing_loss_func",
    setting="router_aux_loss_coef",
    choice_power=1,
    layers="pooled",
    counts="all",
    accumulation="summed if the Trainer leaves the division to the model",
    source="huggingface/transformers:src/transformers/models/mixtral/modeling_mixtral.py",
    checked=f"{_READ}; accumulation in copies of trainer.py, whose versions differ",
  ),
  "deepseek": Convention(
    title="DeepSeekMoE, DeepSeek-V2 and V3 papers",
    setting="alpha",
    layers="sum",
    counts="all",
    accumulation=_UNSAID,
    source="2401.06066, 2405.04434, 2412.19437",
    checked="as documented, not re-read; formula and layers in copies of the released modelling code",
  ),
}

# Router z-losses, each a factor times the mean over tokens of logsumexp(logits)^2 (2202.08906, eq. 5).
Z_CONVENTIONS: Mapping[str, Convention] = {
  "moe_jax": dataclasses.replace(
    CONVENTIONS["moe_jax"], title="moe_jax: z_loss", setting="--balancers=z_loss:WEIGHT", counts=""
  ),
  "mesh_tensorflow": Convention(
    title="Mesh-TensorFlow, Switch gating; added to the balancing loss before moe_loss_coef (0.01) multiplies both",
    setting="moe_z_loss",
    factor=0.01,
    layers="sum",
    accumulation="divided by their number",
    source="tensorflow/mesh:mesh_tensorflow/transformer/moe.py, transformer.py",
    checked="formula and accumulation read in copies of moe.py; layers as for its other loss",
  ),
  "flaxformer": dataclasses.replace(
    CONVENTIONS["flaxformer"], setting="router_z_loss_factor", choice_power=0, counts=""
  ),
  "megatron_lm": dataclasses.replace(CONVENTIONS["megatron_lm"], setting="--moe-z-loss-coeff", counts=""),
  "levanter": dataclasses.replace(CONVENTIONS["levanter"], setting="rzl_coef", choice_power=0, counts=""),
  "olmo_core": dataclasses.replace(CONVENTIONS["olmo_core"], setting="z_loss_weight", counts=""),
  "megablocks": dataclasses.replace(
    CONVENTIONS["megablocks"],
    setting="moe_zloss_weight",
    layers="caller",
    counts="",
    source="databricks/megablocks:megablocks/layers/router.py",
    checked="formula read in a copy",
  ),
  "megablocks_fork": Convention(
    title="A fork of MegaBlocks with a z-loss in the load-balancing function; also divides by K",
    setting="moe_zloss_weight",
    choice_power=-1,
    layers="mean",
    accumulation="left to the caller",
    source="swj0419/megablocks:megablocks/layers/moe.py",
    checked=_READ,
  ),
}

LOSSES: Mapping[str, Mapping[str, Convention]] = {"load_balancing": CONVENTIONS, "z": Z_CONVENTIONS}


def get_convention(name: str, loss: str = "load_balancing") -> Convention:
  """The convention `name` for `loss`, "load_balancing" or "z".

  Raises:
    InputError: if the loss or the name is unknown; the message suggests the nearest names.
  """
  require_option("conventions", "loss", loss, tuple(LOSSES))
  if name not in LOSSES[loss]:
    raise unknown_name(f"convention of the {loss.replace('_', '-')} loss", name, LOSSES[loss])
  return LOSSES[loss][name]


def value_at_balance(
  name: str,
  *,
  num_experts: int,
  num_experts_per_token: int,
  num_layers: int,
  loss: str = "load_balancing",
) -> float:
  """Returns the loss of the whole model with coefficient 1 at perfect balance; `num_layers` for "moe_jax".

  For `loss="z"`, the unit is the mean over tokens and layers of logsumexp(logits)^2. `num_layers` counts
  only layers with experts.

  Raises:
    InputError: if the name is unknown, the sizes are invalid, or the loss leaves combining layers to the caller.
  """
  convention = get_convention(name, loss)
  e, k, layers = num_experts, num_experts_per_token, num_layers
  if not (1 <= k <= e and layers >= 1):
    raise InputError(
      f"conventions: 1 <= num_experts_per_token <= num_experts and num_layers >= 1 must hold, got "
      f"num_experts_per_token={k}, num_experts={e}, num_layers={layers}"
    )
  if convention.layers == "caller":
    raise InputError(
      f"convention {name}: returns one {loss} loss per layer; use megatron_lm if your trainer sums them, "
      f"olmo_core if it averages them"
    )
  one_layer = convention.factor * float(e) ** convention.expert_power * float(k) ** convention.choice_power
  return one_layer * (layers if convention.layers == "sum" else 1)


def _check_weight(weight: float) -> None:
  if not math.isfinite(weight):
    raise InputError(f"conventions: weight must be finite, got {weight}")


def per_layer_weight(
  weight: float,
  name: str,
  *,
  num_experts: int,
  num_experts_per_token: int,
  num_layers: int,
  loss: str = "load_balancing",
) -> float:
  """Returns the factor on one layer's loss, if that loss is 1 at balance. Raises the same errors as `convert`."""
  _check_weight(weight)
  value = value_at_balance(
    name,
    num_experts=num_experts,
    num_experts_per_token=num_experts_per_token,
    num_layers=num_layers,
    loss=loss,
  )
  return weight * value / num_layers


def convert(
  weight: float,
  source: str,
  target: str,
  *,
  num_experts: int,
  num_experts_per_token: int,
  num_layers: int,
  loss: str = "load_balancing",
) -> float:
  """Returns the coefficient in `target` that is equivalent to `weight` in `source`, without gradient accumulation.

  Raises:
    InputError: as in `value_at_balance`, or if the weight is not finite.
  """
  _check_weight(weight)
  sizes = {"num_experts_per_token": num_experts_per_token, "num_layers": num_layers}
  there = value_at_balance(source, num_experts=num_experts, **sizes, loss=loss)
  here = value_at_balance(target, num_experts=num_experts, **sizes, loss=loss)
  return weight * there / here
