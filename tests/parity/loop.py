"""DeepSeekMoE-16B, which transformers has not: logits and gradients against a NumPy loop over a tiny checkpoint."""

import pathlib

import numpy as np

import moe_jax
from tests.interop.test_families import deepseek_checkpoint, deepseek_moe
from tests.parity import models

ENTRIES = 3  # of each tensor, whose gradients are compared
STEP = 1e-30


def figures(folder: pathlib.Path) -> models.Figures:
  """Writes the checkpoint to `folder` and compares. The gradients of the loop are complex steps, exact in float64."""
  w, tokens_L = deepseek_checkpoint(folder)
  ours = models.ours(moe_jax.load(folder), tokens_L[None])
  gradients = [_distance(w, name, tokens_L, ours.gradients[name]) for name in w]
  return models.Figures(
    models.distance(ours.logits_BLV[0], deepseek_moe(w, tokens_L)), max(gradients), None, None
  )


def _distance(w: dict[str, np.ndarray], name: str, tokens_L: np.ndarray, ours: np.ndarray) -> float:
  """Of the two largest entries of our gradient and of another one: the difference, relative to the largest."""
  rng = np.random.default_rng(0)
  order = np.argsort(-np.abs(ours), axis=None)
  places = [*order[: ENTRIES - 1], rng.choice(order[ENTRIES - 1 :])]
  theirs = []
  for place in places:
    moved = {key: x.astype(np.complex128) for key, x in w.items()}
    moved[name].flat[place] += 1j * STEP
    theirs.append(_loss(deepseek_moe(moved, tokens_L), tokens_L).imag / STEP)
  return models.distance(ours.flat[places], np.array(theirs))


def _loss(logits_LV: np.ndarray, tokens_L: np.ndarray) -> np.complex128:
  """The mean cross entropy of the next token."""
  total_L = np.log(np.exp(logits_LV[:-1]).sum(axis=-1))
  return (total_L - logits_LV[np.arange(len(tokens_L) - 1), tokens_L[1:]]).mean()
