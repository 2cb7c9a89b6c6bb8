"""Policy gradients on answers that can be checked, for measuring what routers do to them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from moe_jax.errors import InputError
from moe_jax.types import Array

CLOSING = {"(": ")", "[": "]", "{": "}", "<": ">"}


class Task(NamedTuple):
  """A task whose answer has as many characters as its question."""

  question: Callable[[np.random.Generator, int], str]  # (rng, number of characters) -> a question
  answer: Callable[[str], str]
  symbols: int  # that a character may be


def _brackets(rng: np.random.Generator, number: int) -> str:
  return "".join(rng.choice(list(CLOSING), number))


def _digits(rng: np.random.Generator, number: int) -> str:
  return "".join(map(str, rng.integers(0, 10, number)))


TASKS = {
  "brackets": Task(_brackets, lambda text: "".join(CLOSING[c] for c in reversed(text)), len(CLOSING)),
  "digits": Task(_digits, lambda text: "".join(sorted(text)), 10),
}


def reward(answer: str, expected: str) -> float:
  """Returns 1 for the expected answer, and otherwise half of the share of its characters that are in their place."""
  if answer == expected:
    return 1.0
  return 0.5 * sum(a == b for a, b in zip(answer, expected, strict=False)) / len(expected)


def group_advantages(rewards_PG: np.ndarray) -> np.ndarray:
  """Returns the rewards of each prompt's answers minus their mean, divided by their deviation (GRPO, 2402.03300, section 4.1)."""
  centred_PG = rewards_PG - rewards_PG.mean(axis=1, keepdims=True)
  return centred_PG / (rewards_PG.std(axis=1, keepdims=True) + 1e-4)


class ClippedLoss(NamedTuple):
  """The loss of a policy, and what it was made of."""

  loss: Array  # mean over tokens
  clipped: Array  # the share of tokens whose gradient is cut off
  log_ratio: Array  # the mean absolute log of new over old probability


def clipped_loss(
  log_prob_BL: Array, old_log_prob_BL: Array, advantage_B: Array, is_target_BL: Array, clip: float = 0.2
) -> ClippedLoss:
  """Returns the clipped loss of a policy (PPO, 1707.06347, eq. 7; per token as in GRPO, 2402.03300, eq. 3, without its KL term).

  Args:
    log_prob_BL: of the sampled tokens, by the model that is trained.
    old_log_prob_BL: by the model that sampled them.
    advantage_B: of each answer.
    is_target_BL: whether a token is of an answer.
    clip: how far the ratio of probabilities may move from 1.
  """
  log_ratio_BL = jnp.where(is_target_BL, log_prob_BL - old_log_prob_BL, 0.0)
  ratio_BL, advantage_B1 = jnp.exp(log_ratio_BL), advantage_B[:, None]
  limited_BL = jnp.clip(ratio_BL, 1 - clip, 1 + clip)
  gain_BL = jnp.minimum(ratio_BL * advantage_B1, limited_BL * advantage_B1)
  mean = lambda x_BL: jnp.where(is_target_BL, x_BL, 0).sum() / jnp.maximum(is_target_BL.sum(), 1)
  is_cut_BL = (limited_BL * advantage_B1 < ratio_BL * advantage_B1).astype(jnp.float32)
  return ClippedLoss(-mean(gain_BL), mean(is_cut_BL), mean(jnp.abs(log_ratio_BL)))


def split_questions(
  task: Task, length: int, held_out: int, seed: int
) -> tuple[list[str], Callable[[int, int], Sequence[str]]]:
  """Returns (held-out questions, a function from (number, step) to questions that are none of those).

  Raises:
    InputError: if the task has not at least twice as many questions of this length as are held out.
  """
  if task.symbols**length < 2 * held_out:
    raise InputError(
      f"--length={length}: there are {task.symbols**length} questions of it, and {held_out} are held out; use a longer one"
    )
  rng = np.random.default_rng((seed, 0))
  held = list(dict.fromkeys(task.question(rng, length) for _ in range(held_out)))
  forbidden = set(held)

  def draw(number: int, step: int) -> Sequence[str]:
    rng, found = np.random.default_rng((seed, 1 + step)), []
    while len(found) < number:
      question = task.question(rng, length)
      if question not in forbidden:
        found.append(question)
    return found

  return held, draw
