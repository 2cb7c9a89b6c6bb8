"""Objectives: what training minimises. `OBJECTIVES` has all of them by name.

An objective maps a model and a micro-batch to a loss that is a sum over targets. The step divides the sums of
all micro-batches by the targets of the whole step, so a step means the same however its batch is cut.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from moe_jax.errors import InputError
from moe_jax.nn.context import Context
from moe_jax.nn.mtp import ahead
from moe_jax.registry import Registry
from moe_jax.training.digests import tree_digest
from moe_jax.types import Array, MoEAux, PyTree

Batch = dict[str, Array]  # tokens_BL, targets_BL int32; mask_BL bool; domain_B int32; what `prepare` adds


class Terms(NamedTuple):
  """The result of an objective for one micro-batch."""

  loss: Array  # float32 scalar, summed over targets; in nats if it is a likelihood
  aux: PyTree  # the aux of the model


@dataclasses.dataclass(frozen=True)
class Objective:
  """The base class of objectives. Subclasses are frozen dataclasses, whose fields are their options.

  Both the loss and its evaluation are sums over targets, never means: of a batch with each sequence twice, they and
  `num_targets` are twice as large. What is drawn for a sequence follows from its own key. An objective of a user's is tried
  on a tiny batch (`moe_jax.training.own_objectives`).
  """

  @property
  def causal(self) -> bool:
    """Whether a position may see only earlier positions. It makes the model causal or bidirectional."""
    return True

  @property
  def num_extra_ids(self) -> int:
    """The number of ids after the vocabulary that the model must embed, such as a mask."""
    return 0

  @property
  def looks_ahead(self) -> bool:
    """Whether it trains the modules of multi-token prediction of a model (`ModelConfig.mtp_depth`)."""
    return False

  @property
  def digest(self) -> str:
    """A digest of the parameters that it has beside the model, such as a teacher's, which may not change. Empty: none."""
    return ""

  def prepare(self, batch: Batch, key_B: Array, vocab_size: int) -> Batch:
    """Returns the batch of the whole step, before it is cut into micro-batches, with what the objective adds.

    Args:
      batch: tokens_BL, targets_BL, mask_BL and domain_B.
      key_B: a random key for each sequence.
      vocab_size: V, without extra ids.
    """
    del key_B, vocab_size
    return batch

  def num_targets(self, batch: Batch) -> Array:
    """Returns the number of targets that the loss is summed over."""
    return batch["mask_BL"].sum()

  def __call__(self, model: nnx.Module, batch: Batch, context: Context) -> Terms:
    """Returns the loss that training minimises, summed over targets."""
    raise NotImplementedError

  def evaluate(self, model: nnx.Module, batch: Batch, context: Context) -> Terms:
    """Returns the negative log likelihood of the targets, summed over them.

    Every result reports it, whatever training minimises. Override it if the training loss is another.
    """
    return self(model, batch, context)


def nll(logits_BLV: Array, targets_BL: Array) -> Array:
  """Returns the negative log likelihood of the targets in nats, [B, L]."""
  return optax.softmax_cross_entropy_with_integer_labels(logits_BLV, targets_BL)


@dataclasses.dataclass(frozen=True)
class NextToken(Objective):
  """Next-token prediction. Subclasses may override `token_losses`. Evaluation remains the likelihood."""

  def token_losses(self, logits_BLV: Array, targets_BL: Array) -> Array:
    """Returns the loss of each target, [B, L]."""
    return nll(logits_BLV, targets_BL)

  def __call__(self, model: nnx.Module, batch: Batch, context: Context) -> Terms:
    return self._terms(model, batch, context, self.token_losses)

  def evaluate(self, model: nnx.Module, batch: Batch, context: Context) -> Terms:
    return self._terms(model, batch, context, nll)

  def _is_target(self, batch: Batch) -> Array:
    """Returns which tokens the loss is of, [B, L]."""
    return batch["mask_BL"]

  def _terms(self, model: nnx.Module, batch: Batch, context: Context, token_losses: Any) -> Terms:
    is_target_BL = self._is_target(batch)
    logits_BLV, aux = model(batch["tokens_BL"], context)
    return Terms(jnp.sum(token_losses(logits_BLV, batch["targets_BL"]) * is_target_BL), aux)


@dataclasses.dataclass(frozen=True)
class NextTokens(NextToken):
  """Next-token prediction with modules that predict further tokens (DeepSeek-V3, 2412.19437, eq. 24-25).

  The loss of the modules is weight / depth times the sum over modules of their cross entropies. Each is divided by all
  targets of the step, although the last tokens of a sequence have none so far ahead. The balancing losses in a
  module have the same factor and are divided in the same way (our choice), so a weight of 0 leaves the gradients of
  the model as they are without modules. Evaluation remains the likelihood of the next token.

  Raises:
    InputError: if `weight` is negative.
  """

  weight: float = 0.3  # V3's for its first 10 of 14.8 trillion tokens, then 0.1

  def __post_init__(self) -> None:
    if self.weight < 0:
      raise InputError(f"objective next_tokens: weight must be 0 or more, got {self.weight}")

  @property
  def looks_ahead(self) -> bool:
    return True

  def __call__(self, model: nnx.Module, batch: Batch, context: Context) -> Terms:
    mask_BL, targets_BL = batch["mask_BL"], batch["targets_BL"]
    (logits_BLV, *further), aux = model.predict_ahead(batch["tokens_BL"], targets_BL, context)
    loss = jnp.sum(self.token_losses(logits_BLV, targets_BL) * mask_BL)
    share, of_model = self.weight / max(len(further), 1), len(aux) - len(further)
    auxes = list(aux[:of_model])
    for k, logits_BLV in enumerate(further, start=1):
      own_BL = ahead(mask_BL, k)
      loss += share * jnp.sum(self.token_losses(logits_BLV, ahead(targets_BL, k)) * own_BL)
      fraction = own_BL.sum() / jnp.maximum(mask_BL.sum(), 1)
      auxes.append(_of_module(aux[of_model + k - 1], share * fraction))
    return Terms(loss, tuple(auxes))


def _of_module(aux: PyTree, share: Array) -> PyTree:
  """Returns the aux of a module with its losses times `share`. Recorded logits are those of the model alone."""

  def scaled(layer: Any) -> Any:
    if not isinstance(layer, MoEAux):
      return layer
    losses = {name: share * loss for name, loss in layer.losses.items()}
    return layer._replace(losses=losses, logits_BLE=None, selected_BLE=None)

  return jax.tree.map(scaled, aux, is_leaf=lambda leaf: isinstance(leaf, MoEAux))


@dataclasses.dataclass(frozen=True)
class Response(NextToken):
  """Next-token prediction of the responses only, for data with `is_target_BL`: `moe_jax.data.prompts`."""

  def num_targets(self, batch: Batch) -> Array:
    return self._is_target(batch).sum()

  def _is_target(self, batch: Batch) -> Array:
    if "is_target_BL" not in batch:
      raise InputError(
        "objective response: the data has no responses; train on prompts, or choose next_token"
      )
    return batch["is_target_BL"]


@dataclasses.dataclass(frozen=True)
class Distil(NextToken):
  """Distillation (1503.02531, as in Switch, 2101.03961, section 4.2): the predictions of a teacher as soft targets.

  The loss of a token is (1 - soft) times its likelihood and soft times T^2 KL(teacher || student), both with logits
  divided by T. Evaluation remains the likelihood.

  Raises:
    InputError: if there is no teacher, `temperature` is not above 0, or `soft` is not in [0, 1].
  """

  teacher: str = ""  # the folder of a run
  temperature: float = 1.0
  soft: float = 0.25

  def __post_init__(self) -> None:
    if not self.teacher:
      raise InputError("objective distil: needs a teacher, e.g. distil:teacher=runs/a/arms/b/seed_0")
    if self.temperature <= 0:
      raise InputError(f"objective distil: temperature must be above 0, got {self.temperature}")
    if not 0 <= self.soft <= 1:
      raise InputError(f"objective distil: soft must be in [0, 1], got {self.soft}")

  @property
  def digest(self) -> str:
    return _digest_of_teacher(self.teacher)

  def __call__(self, model: nnx.Module, batch: Batch, context: Context) -> Terms:
    graphdef, state = _teacher(self.teacher)
    teacher = nnx.merge(graphdef, jax.tree.map(jnp.asarray, state))
    fields = ("mask_BL", "domain_B", "num_domains", "segment_BL")
    plain = Context(**{name: getattr(context, name) for name in fields})
    target_BLV = jax.lax.stop_gradient(teacher(batch["tokens_BL"], plain)[0])
    logits_BLV, aux = model(batch["tokens_BL"], context)
    if logits_BLV.shape != target_BLV.shape:
      raise InputError(
        f"objective distil: the student has a vocabulary of {logits_BLV.shape[-1]} and the teacher {self.teacher} one of "
        f"{target_BLV.shape[-1]}; use one tokenizer"
      )
    log_probs_BLV, log_targets_BLV = (
      jax.nn.log_softmax(x / self.temperature) for x in (logits_BLV, target_BLV)
    )
    soft_BL = self.temperature**2 * jnp.sum(
      jnp.exp(log_targets_BLV) * (log_targets_BLV - log_probs_BLV), axis=-1
    )
    loss_BL = (1 - self.soft) * nll(logits_BLV, batch["targets_BL"]) + self.soft * soft_BL
    return Terms(jnp.sum(loss_BL * self._is_target(batch)), aux)


@dataclasses.dataclass(frozen=True)
class DistilResponse(Distil, Response):
  """`Distil` on the responses only, for data with `is_target_BL`, as `Response` is `NextToken` on them."""


@functools.lru_cache(maxsize=2)
def _teacher(folder: str) -> tuple[nnx.GraphDef, PyTree]:
  """The model in the folder of a run, on the host: constants of the program, whatever mesh it runs on.

  Raises:
    InputError: if there is none, or it sees later tokens.
  """
  from moe_jax.training.load import load_run  # which has the objectives

  with jax.ensure_compile_time_eval():
    model = load_run(folder).model
    if not model.config.causal:
      raise InputError(
        f"objective distil: the teacher {folder} sees later tokens (objective masked_lm), so it does not predict the next one; "
        "choose a causal teacher"
      )
    graphdef, state = nnx.split(model)
    return graphdef, jax.device_get(state)


@functools.lru_cache(maxsize=2)
def _digest_of_teacher(folder: str) -> str:
  return tree_digest(nnx.filter_state(_teacher(folder)[1], nnx.Param))


@dataclasses.dataclass(frozen=True)
class MaskedTokens(Objective):
  """Prediction of masked tokens by a bidirectional model (BERT, 1810.04805, section 3.1).

  Each token is a target with probability `rate`. Of the targets, 80% are replaced by the mask, which is the
  first id after the vocabulary, 10% by a random id, and 10% are kept. Every position sees all others, so a
  router that looks ahead leaks nothing.

  Raises:
    InputError: if `rate` is not in (0, 1).
  """

  rate: float = 0.15

  def __post_init__(self) -> None:
    if not 0 < self.rate < 1:
      raise InputError(f"objective masked_lm: rate must be in (0, 1), got {self.rate}")

  @property
  def causal(self) -> bool:
    return False

  @property
  def num_extra_ids(self) -> int:
    return 1

  def prepare(self, batch: Batch, key_B: Array, vocab_size: int) -> Batch:
    tokens_BL, length = batch["tokens_BL"], batch["tokens_BL"].shape[1]

    def draw(key: Array) -> tuple[Array, Array, Array]:
      chosen, kind, other = jax.random.split(jax.random.fold_in(key, length), 3)
      uniform = lambda key: jax.random.uniform(key, (length,), jnp.float32)
      return uniform(chosen), uniform(kind), jax.random.randint(other, (length,), 0, vocab_size)

    chosen_BL, kind_BL, random_BL = jax.vmap(draw)(key_B)
    is_target_BL = batch["mask_BL"] & (chosen_BL < self.rate)
    replaced_BL = jnp.where(kind_BL < 0.8, vocab_size, jnp.where(kind_BL < 0.9, random_BL, tokens_BL))
    return batch | {
      "tokens_BL": jnp.where(is_target_BL, replaced_BL, tokens_BL),
      "targets_BL": tokens_BL,
      "is_target_BL": is_target_BL,
    }

  def num_targets(self, batch: Batch) -> Array:
    return batch["is_target_BL"].sum()

  def __call__(self, model: nnx.Module, batch: Batch, context: Context) -> Terms:
    logits_BLV, aux = model(batch["tokens_BL"], context)
    return Terms(jnp.sum(nll(logits_BLV, batch["targets_BL"]) * batch["is_target_BL"]), aux)


OBJECTIVES = Registry(
  "objective",
  {
    "next_token": NextToken,
    "next_tokens": NextTokens,
    "response": Response,
    "distil": Distil,
    "distil_response": DistilResponse,
    "masked_lm": MaskedTokens,
  },
)
