"""Objectives of a user's own, tried on a small model: a loss is a sum over targets, and results report a likelihood."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.cluster import processes
from moe_jax.config import ModelConfig
from moe_jax.disk import note
from moe_jax.errors import InputError
from moe_jax.fingerprint import place
from moe_jax.nn.causality import SMALL
from moe_jax.nn.context import Context
from moe_jax.nn.own_parts import trial
from moe_jax.nn.transformer import Transformer
from moe_jax.nn.variables import constants, matrices_of
from moe_jax.registry import Method
from moe_jax.training.objectives import Batch, Distil, NextToken, Objective, nll
from moe_jax.training.own_leaks import on_cpu, say_untried
from moe_jax.types import Array

_SEEN = 1e-3  # of the size of a sum; smaller differences are rounding
_VOCAB, _BATCH, _LENGTH = 16, 3, 12


def check_own_objective(method: Method) -> None:
  """Raises `InputError` if an objective of a user's is a mean over targets, or evaluates something else than a likelihood.

  A mean would train at another learning rate with each batch, and results would divide it by the targets once more. Of a
  batch with each sequence twice, a sum is twice as large. A training loss that is neither is said in one line. Where it is also
  what results report, because `evaluate` is that of `Objective`, it must be the likelihood.

  A small model without experts computes it, on a CPU. The objective's own `InputError` there may be of the tiny batch, and
  the program of the run meets it otherwise. Distillation is not tried: a teacher has the vocabulary of the text.
  """
  if not method.source or isinstance(method(), Distil):
    return
  with trial([method]):
    _check(method)
  if processes.is_first():
    say_untried("objective", method)


@functools.lru_cache(maxsize=64)
def _check(method: Method) -> None:
  objective = method()
  try:
    found = _measured(objective)
  except InputError:
    return
  what, small = f"objective {method.name} ({place(method.factory)})", 1e-6 * _BATCH * _LENGTH
  is_near = lambda a, b: not np.isfinite(a - b) or abs(a - b) <= max(_SEEN * abs(b), small)
  for of in ("the training loss", "evaluate", "num_targets"):
    once, twice = found[of]
    if is_near(twice, 2 * once):
      continue
    # A loss may compare the sequences of a batch, or penalise weights. Nothing that is reported may.
    if of == "the training loss" and not is_near(twice, once):
      if processes.is_first():
        note(
          f"{what}: {of} of a batch with each sequence twice is not twice as large ({twice:.5g}, and {once:.5g} with each once), "
          "so it is no sum over targets, and depends on how many sequences are in a micro-batch"
        )
      continue
    raise InputError(
      f"{what}: {of} of a batch with each sequence twice is {twice:.5g}, and {once:.5g} with each once; it must be twice as "
      "large: the sum over targets, not a mean (and draws must follow from the key of each sequence)"
    )
  evaluated, targets = found["evaluate"][0], found["num_targets"][0]
  likelihoods = [x for count, *sums in found.get("likelihoods", ()) if is_near(count, targets) for x in sums]
  if likelihoods and not any(is_near(evaluated, x) for x in likelihoods):
    raise InputError(
      f"{what}: evaluate is the training loss, which is {evaluated:.5g} where the negative log likelihood of the targets is "
      f"{likelihoods[0]:.5g}; every result reports it as that: override evaluate, or derive from NextToken and override "
      "token_losses"
    )


def _measured(objective: Objective) -> dict[str, Any]:
  """Returns the training loss, evaluate and num_targets of a batch, and of it with each sequence twice.

  likelihoods: only where `evaluate` is the training loss. For each array of the prepared batch that may say which tokens are
    targets, the number of these, and their negative log likelihood among all ids and among those of the vocabulary.
    `num_targets` tells which array it is.
  """

  def measure() -> dict[str, Any]:
    with matrices_of(constants(0.5)):  # so large that the logits of different ids differ much
      vocab_size = _VOCAB + objective.num_extra_ids
      config = ModelConfig(ffn="mlp", causal=objective.causal, mtp_depth=int(objective.looks_ahead), **SMALL)
      model = Transformer(config, vocab_size, rngs=nnx.Rngs(0))
    once, twice = (_sums(objective, model, copies) for copies in (1, 2))
    found = {name: (once[name], twice[name]) for name in once}
    is_loss = type(objective).evaluate is Objective.evaluate and not isinstance(objective, NextToken)
    return found | ({"likelihoods": _likelihoods(objective, model)} if is_loss else {})

  # It runs once, so compiling is what takes time: one program, in a hurry.
  with on_cpu():
    hurry = {"xla_backend_optimization_level": 0}
    return jax.device_get(jax.jit(measure, compiler_options=hurry)())


def _sums(objective: Objective, model: Transformer, copies: int) -> dict[str, Array]:
  batch, key_B = _batch(objective, copies)
  evaluation = Context.of_batch(batch, num_domains=2)
  training = evaluation._replace(key_B=key_B, step_key=jax.random.key(1), train=True)
  loss, _ = objective(model, batch, training)
  evaluated, _ = objective.evaluate(model, batch, evaluation)
  return {"the training loss": loss, "evaluate": evaluated, "num_targets": objective.num_targets(batch)}


def _likelihoods(objective: Objective, model: Transformer) -> list[tuple[Array, ...]]:
  batch, _ = _batch(objective, copies=1)
  logits_BLV, _ = model(batch["tokens_BL"], Context.of_batch(batch, num_domains=2))
  nlls = [nll(x_BLV, batch["targets_BL"]) for x_BLV in (logits_BLV, logits_BLV[..., :_VOCAB])]
  arrays = [x for x in batch.values() if jnp.shape(x) == nlls[0].shape]
  weights = [x for x in arrays if not jnp.issubdtype(jnp.result_type(x), jnp.integer)]
  return [(w_BL.sum(), *(jnp.sum(nll_BL * w_BL) for nll_BL in nlls)) for w_BL in weights]


def _batch(objective: Objective, copies: int) -> tuple[Batch, Array]:
  """Returns a prepared batch with each sequence in it `copies` times, and the keys of its sequences."""
  draw, shape = np.random.default_rng(0), (_BATCH, _LENGTH)
  place_L = np.arange(_LENGTH)
  batch = {
    "tokens_BL": draw.integers(_VOCAB, size=shape, dtype=np.int32),
    "targets_BL": draw.integers(_VOCAB, size=shape, dtype=np.int32),
    "mask_BL": np.array([_LENGTH, _LENGTH - 1, _LENGTH - 4])[:, None] > place_L,
    "domain_B": np.arange(_BATCH, dtype=np.int32) % 2,
  }
  batch |= {"is_target_BL": batch["mask_BL"] & (place_L > 3)}  # of prompts, which data may have
  again = lambda x: jnp.concatenate([x] * copies)
  key_B = again(jax.random.split(jax.random.key(0), _BATCH))
  return objective.prepare({name: again(x) for name, x in batch.items()}, key_B, _VOCAB), key_B
