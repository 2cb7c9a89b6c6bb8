"""`markov`: a mixture of Markov chains, one per domain, whose best possible loss is known.

Each window comes from one domain, drawn uniformly, and starts in that chain's stationary distribution, so
every position has the same distribution. Windows are generated on demand from (split, index) alone and have no
padding. `data_seed` changes neither the chains nor the windows; it only orders the training windows.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from moe_jax.config import DataConfig
from moe_jax.data.dataset import Dataset, DatasetInfo
from moe_jax.data.windows import Batch
from moe_jax.errors import InputError

NUM_TRAIN = 1 << 20  # windows; nothing is stored, so this only sets the length of an epoch
NUM_VALIDATION = 512
_MOST_TOKENS = 1 << 25  # of the validation, drawn when the data set is loaded: half a minute
_CHAIN_SEED = 20_240_101
_SPLITS = {"train": 0, "validation": 1}


class MarkovChains:
  """The parameters of the chains: `transition_SVV[s, i, j]` = p(next = j | now = i, domain s). Rows sum to 1.

  Transition logits are standard normal divided by `temperature`. The stationary distribution is exact.
  """

  def __init__(self, domains: int, states: int, temperature: float):
    rng = np.random.default_rng((_CHAIN_SEED, domains, states))
    logits = rng.standard_normal((domains, states, states)) / temperature
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    self.transition_SVV = weights / weights.sum(-1, keepdims=True)
    self.stationary_SV = np.stack([_stationary(p) for p in self.transition_SVV])
    self.parameters = f"markov v1 domains={domains} states={states} temperature={float(temperature)!r}"

  @property
  def entropy_rate(self) -> float:
    """Nats per token if the domain is known: row entropies weighted by the stationary distribution, mean over domains."""
    p = self.transition_SVV
    entropy_SV = -np.sum(p * np.log(np.where(p > 0, p, 1.0)), axis=-1)
    return float(np.mean(np.sum(self.stationary_SV * entropy_SV, axis=-1)))

  def optimal_nll(self, windows_BX: np.ndarray) -> float:
    """Nats per target of the true mixture model, which infers the domain from the tokens of the window so far.

    Args:
      windows_BX: [B, L+1] tokens. The first token is given, not predicted, but it is evidence of the domain.
    """
    with np.errstate(divide="ignore"):
      log_p, log_start = np.log(self.transition_SVV), np.log(self.stationary_SV)
    joint_SB = log_start[:, windows_BX[:, 0]]  # log p(tokens so far | domain)
    first_B = np.logaddexp.reduce(joint_SB, axis=0)
    for now, then in zip(windows_BX.T[:-1], windows_BX.T[1:], strict=True):
      joint_SB = joint_SB + log_p[:, now, then]
    # By the chain rule, the log likelihoods of the predictions sum to log p(window) - log p(first token).
    # The uniform prior over domains cancels.
    return float(np.mean(first_B - np.logaddexp.reduce(joint_SB, axis=0)) / (windows_BX.shape[1] - 1))


class MarkovWindows:
  """The windows of one split, generated when they are read."""

  def __init__(self, chains: MarkovChains, split: str, num_windows: int, sequence_length: int):
    self._split = _SPLITS[split]
    self._num_windows = num_windows
    self._length = sequence_length
    self._start_SV = np.cumsum(chains.stationary_SV, axis=-1)
    self._next_SVV = np.cumsum(chains.transition_SVV, axis=-1)

  def __len__(self) -> int:
    return self._num_windows

  def rows(self, indices: Sequence[int]) -> Batch:
    """Returns the windows with these indices. All rows advance together, each with its own random numbers."""
    generators = [np.random.default_rng((_CHAIN_SEED, self._split, int(i))) for i in indices]
    draws = [g.random(self._length + 2) for g in generators]
    u_BX = np.array(draws).reshape(len(draws), self._length + 2)
    domain_B = (u_BX[:, 0] * len(self._start_SV)).astype(np.int32)
    window = np.empty((len(draws), self._length + 1), np.int32)
    window[:, 0] = _invert(self._start_SV[domain_B], u_BX[:, 1])
    for t in range(self._length):
      window[:, t + 1] = _invert(self._next_SVV[domain_B, window[:, t]], u_BX[:, t + 2])
    return {
      "tokens_BL": window[:, :-1],
      "targets_BL": window[:, 1:],
      "mask_BL": np.ones((len(draws), self._length), bool),
      "domain_B": domain_B,
    }


def load_markov(config: DataConfig) -> Dataset:
  most = _MOST_TOKENS // NUM_VALIDATION
  if config.sequence_length > most:
    raise InputError(
      f"--sequence_length={config.sequence_length}: --dataset=markov draws {NUM_VALIDATION} windows for validation, token "
      f"by token; use at most {most}, or a data set of text"
    )
  chains = MarkovChains(config.markov_domains, config.markov_states, config.markov_temperature)
  train = MarkovWindows(chains, "train", NUM_TRAIN, config.sequence_length)
  validation = MarkovWindows(chains, "validation", NUM_VALIDATION, config.sequence_length)
  batch = validation.rows(range(NUM_VALIDATION))
  windows = np.concatenate([batch["tokens_BL"], batch["targets_BL"][:, -1:]], axis=1)
  per_domain = np.bincount(batch["domain_B"], minlength=config.markov_domains) * config.sequence_length
  info = DatasetInfo(
    name="markov",
    vocab_size=config.markov_states,
    domains=tuple(f"chain{s}" for s in range(config.markov_domains)),
    fingerprint=hashlib.sha256(chains.parameters.encode()).hexdigest(),
    num_windows={"train": NUM_TRAIN, "validation": NUM_VALIDATION},
    targets_per_domain={"validation": tuple(int(n) for n in per_domain)},
    padded_fraction={"train": 0.0, "validation": 0.0},
    num_bytes={},
    bytes_per_domain={},
    bytes_per_token=None,
    yardsticks={},
    entropy_rate=chains.entropy_rate,
    validation_floor=chains.optimal_nll(windows),
  )
  return Dataset(config, info, train, validation)


def _stationary(p_VV: np.ndarray) -> np.ndarray:
  """The left eigenvector of eigenvalue 1, from pi @ p_VV = pi and sum(pi) = 1; unique if every p > 0."""
  n = len(p_VV)
  equations = np.concatenate([p_VV.T - np.eye(n), np.ones((1, n))])
  pi = np.linalg.lstsq(equations, np.eye(n + 1)[n], rcond=None)[0]
  return np.maximum(pi, 0) / np.maximum(pi, 0).sum()


def _invert(cumulative_BV: np.ndarray, u_B: np.ndarray) -> np.ndarray:
  """Inverse transform sampling; rounding may leave the last cumulative sum a little under 1."""
  return np.minimum((cumulative_BV <= u_B[:, None]).sum(-1), cumulative_BV.shape[-1] - 1)
