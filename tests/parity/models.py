"""Whole tiny models of transformers with random weights, and what they and ours make of the same tokens."""

import functools
import pathlib
import tempfile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.interop.families import FAMILIES
from moe_jax.interop.folder import CONFIG, open_folder, read_config
from moe_jax.interop.save import pending_tensors
from moe_jax.nn.context import Context
from moe_jax.training.load import Loaded
from tests.parity import oracles

B, L, V = 2, 10, 40
TOKENS_BL = np.random.default_rng(0).integers(0, V, (B, L)).astype(np.int32)

SIZES = {
  "hidden_size": 16,
  "intermediate_size": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "vocab_size": V,
  "max_position_embeddings": 64,
  "pad_token_id": None,
  "bos_token_id": None,
  "eos_token_id": None,
}
GQA = SIZES | {"num_key_value_heads": 2, "head_dim": 8}


def build(prefix: str, seed: int = 0, **fields: Any):
  """A model for causal text with random weights, also where transformers starts at zeros or ones."""
  config = getattr(oracles.transformers, f"{prefix}Config")(**fields)
  config._experts_implementation = "eager"
  config._attn_implementation = "eager"
  model = getattr(oracles.transformers, f"{prefix}ForCausalLM")(config).eval().float()
  generator = oracles.torch.Generator().manual_seed(seed)
  normal = lambda x: oracles.torch.randn(x.shape, generator=generator)
  for name, x in [*model.named_parameters(), *model.named_buffers()]:
    if "inv_freq" in name or name.endswith(("slope_rate", "query_decay", "key_decay", "diagonal_decay")):
      continue
    is_norm = x.ndim == 1 and "norm" in name
    x.data = 1 + 0.1 * normal(x) if is_norm else (0.3 if x.ndim > 1 else 0.1) * normal(x)
  return model


class Outcome(NamedTuple):
  """What a model makes of `TOKENS_BL`."""

  logits_BLV: np.ndarray
  loss: float  # the mean cross entropy of the next token
  selected: list[np.ndarray]  # the chosen experts of each layer with experts, sorted, [B * L, K]
  gradients: dict[str, np.ndarray]  # of the loss, by the names of the checkpoint


def theirs(model) -> Outcome:
  """The oracle. Its gradients go through `save_pretrained`, which gives them the names of a checkpoint."""
  selected = []

  def keep(module, inputs, output):
    del module, inputs
    selected.append(np.sort(output[-1].reshape(B * L, -1).numpy(), axis=-1))

  routers = [m for m in model.modules() if type(m).__name__.endswith(("TopKRouter", "TopkRouter"))]
  hooks = [router.register_forward_hook(keep) for router in routers]
  tokens_BL = oracles.torch.tensor(TOKENS_BL).long()
  output = model(tokens_BL, labels=tokens_BL)
  output.loss.backward()
  for hook in hooks:
    hook.remove()
  values = {name: x.data for name, x in model.named_parameters()}
  for x in model.parameters():
    x.data = oracles.torch.zeros_like(x) if x.grad is None else x.grad
  with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    gradients = {name: np.array(x[...]) for name, x in open_folder(pathlib.Path(folder), {}).tensors.items()}
  for name, x in model.named_parameters():
    x.data = values[name]
  logits_BLV = output.logits.detach().numpy()
  return Outcome(logits_BLV, output.loss.item(), selected, gradients)


def ours(loaded: Loaded, tokens_BL: np.ndarray = TOKENS_BL) -> Outcome:
  """What the loaded model makes of the same tokens."""
  for segment in loaded.model.segments:
    segment.remat = "none"  # compiles in half the time
  graphdef, params, rest = nnx.split(loaded.model, nnx.Param, ...)

  @functools.partial(jax.value_and_grad, has_aux=True)
  def loss(params):
    model = nnx.merge(graphdef, params, rest)
    logits_BLV, aux = model(tokens_BL, Context(record_logits=True))
    log_probs_BLV = jax.nn.log_softmax(logits_BLV[:, :-1])
    targets_BL1 = jnp.asarray(tokens_BL)[:, 1:, None]
    return -jnp.take_along_axis(log_probs_BLV, targets_BL1, axis=-1).mean(), (logits_BLV, aux)

  (value, (logits_BLV, aux)), gradients = jax.jit(loss)(params)
  family = FAMILIES[read_config(loaded.folder / CONFIG)["model_type"]]
  pending = pending_tensors(nnx.merge(graphdef, gradients, rest), family, np.dtype(np.float32))
  named = {name: tensor.make() for name, tensor in pending.items()}
  return Outcome(np.asarray(logits_BLV), float(value), _selected(aux), named)


def _selected(aux) -> list[np.ndarray]:
  """The chosen experts layer by layer."""
  layers = []
  for segment in aux:
    found = [block.ffn.selected_BLE for block in segment if block.ffn is not None]
    for repetition in range(len(found[0]) if found else 0):
      for selected_RBLE in found:
        chosen = np.asarray(selected_RBLE[repetition]).reshape(-1, selected_RBLE.shape[-1])
        layers.append(np.stack([np.flatnonzero(row) for row in chosen]))
  return layers


class Figures(NamedTuple):
  """How far two models are from each other."""

  logits: float  # the largest difference, relative to the largest value
  gradients: float  # the same of each tensor, and the worst of them
  differ: int | None  # tokens whose experts differ; None: not counted
  choices: int | None  # of so many, in all layers


def figures(model: Any, ours: Outcome, theirs: Outcome) -> Figures:
  """Compares ours with what `model` of transformers makes of the tokens."""
  shared = theirs.gradients.keys() - {name for name, _ in model.named_buffers()}  # which have no gradient
  differ = sum((a != b).any(axis=-1).sum() for a, b in zip(ours.selected, theirs.selected, strict=True))
  return Figures(
    distance(ours.logits_BLV, theirs.logits_BLV),
    max(distance(ours.gradients[name], theirs.gradients[name]) for name in shared),
    int(differ),
    sum(map(len, ours.selected)),
  )


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
  """The largest difference, relative to the largest value."""
  return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30))
