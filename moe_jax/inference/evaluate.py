"""How likely a text is to a model: perplexity and bits per byte, by domain."""

import functools
import math
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.config import Config
from moe_jax.data import Batch, Dataset
from moe_jax.errors import InputError
from moe_jax.inference.model import on_mesh, rows_of_mesh
from moe_jax.nn.context import Context
from moe_jax.nn.transformer import Transformer
from moe_jax.training.compiled import objective_of
from moe_jax.training.objectives import Response
from moe_jax.types import Array, PyTree

ALL = "all"


class Score(NamedTuple):
  """How well a model predicts the text of one domain, or all text."""

  nll: float  # nats per token
  num_targets: int
  # utf-8 bytes that these tokens stand for, see `Dataset.bytes_of_rows`; 0: they stand for no text, or for parts of one
  num_bytes: float

  @property
  def perplexity(self) -> float:
    return math.exp(min(self.nll, 700.0))

  @property
  def bits_per_byte(self) -> float | None:
    """Compares models with different tokenizers."""
    return self.nll * self.num_targets / math.log(2) / self.num_bytes if self.num_bytes else None


def predicts_responses(config: Config) -> bool:
  """Returns whether the objective of a resolved configuration is the likelihood of responses alone."""
  return isinstance(objective_of(config), Response)


def evaluate(
  model: Transformer, dataset: Dataset, batch_size: int = 16, limit: int = 0, *, responses: bool = True
) -> dict[str, Score]:
  """Returns the scores of a model on a validation split, by domain, and under `"all"` on all of it.

  The layers draw nothing, and use `eval_capacity_factor` where their dispatcher has a capacity, as evaluations in
  training do. On a mesh (`jax.set_mesh`) the model and the batch are sharded.

  Args:
    model: predicts next tokens.
    dataset: with the tokenizer of the model, see `moe_jax.load_dataset`.
    batch_size: sequences at a time. On a mesh it is rounded up to what the devices divide.
    limit: the maximum number of batches; 0: the whole split.
    responses: of prompts with responses, score the responses alone, as training with objective `response` does. False: all,
      as the other objectives. See `predicts_responses`.

  Raises:
    InputError: if the model sees later tokens, or the data set has ids that the model does not embed.
  """
  if not model.config.causal:
    raise InputError("evaluate: the model sees later tokens (objective masked_lm), so text has no likelihood")
  vocab_size = model.embedding_VD[...].shape[0]
  if dataset.info.vocab_size > vocab_size:
    raise InputError(
      f"evaluate: the data set has {dataset.info.vocab_size} token ids and the model embeds {vocab_size}; load it with "
      "the tokenizer of the model"
    )
  graphdef, state = nnx.split(on_mesh(model))
  domains, rows = dataset.info.domains, rows_of_mesh()
  sums = np.zeros((3, len(domains)))  # of nats, targets, bytes
  for batch in dataset.validation_batches(-(-batch_size // rows) * rows, limit=limit):
    is_target_BL = batch.get("is_target_BL", batch["mask_BL"]) if responses else batch["mask_BL"]
    nll_B = _nll(graphdef, state, batch, is_target_BL, len(domains))
    of_batch = (nll_B, is_target_BL.sum(axis=1), dataset.bytes_of_rows(batch))
    for total, values in zip(sums, of_batch, strict=True):
      total += np.bincount(batch["domain_B"], weights=values, minlength=len(domains))
  return {ALL: _score(sums.sum(axis=1))} | {
    name: _score(sums[:, i]) for i, name in enumerate(domains) if sums[1, i]
  }


def reading_speed(model: Transformer, dataset: Dataset, batch_size: int = 16, repeats: int = 5) -> float:
  """Returns the tokens per second that a model reads here: of the fastest of `repeats` passes of one batch.

  It is a forward pass to the loss, in a program that is compiled already.
  """
  graphdef, state = nnx.split(on_mesh(model))
  rows = rows_of_mesh()
  batch = next(dataset.validation_batches(-(-batch_size // rows) * rows, limit=1))
  run = lambda: jax.block_until_ready(
    _nll(graphdef, state, batch, batch["mask_BL"], len(dataset.info.domains))
  )
  run()
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    run()
    seconds.append(time.perf_counter() - start)
  return batch["tokens_BL"].size / min(seconds)


def _score(sums: np.ndarray) -> Score:
  nll, targets, num_bytes = sums
  return Score(float(nll / max(targets, 1)), int(targets), round(float(num_bytes), 3))


@functools.partial(jax.jit, static_argnames=("graphdef", "num_domains"))
def _nll(graphdef: nnx.GraphDef, state: PyTree, batch: Batch, is_target_BL: Array, num_domains: int) -> Array:
  """Returns the nats of the targets of each sequence, [B]."""
  context = Context.of_batch(batch, num_domains=num_domains)
  logits_BLV, _ = nnx.merge(graphdef, state)(batch["tokens_BL"], context)
  log_probs_BLV = jax.nn.log_softmax(logits_BLV, axis=-1)
  nll_BL = -jnp.take_along_axis(log_probs_BLV, batch["targets_BL"][..., None], axis=-1)[..., 0]
  return jnp.sum(nll_BL * is_target_BL, axis=1)
