"""The Markov mixture compared with plain loops, and its loss floor compared with theory."""

import itertools
import math

import numpy as np
import pytest

from moe_jax.data import load_dataset
from moe_jax.data.markov import MarkovChains, MarkovWindows
from tests.data.helpers import config

CHAINS = MarkovChains(domains=3, states=5, temperature=0.5)


def windows_of(chains, count, length, split="validation"):
  batch = MarkovWindows(chains, split, count, length).rows(range(count))
  return np.concatenate([batch["tokens_BL"], batch["targets_BL"][:, -1:]], axis=1), batch["domain_B"]


def loop_nll(chains, windows):
  """The mixture's loss by Bayes' rule, one prediction after another."""
  total = 0.0
  for window in windows:
    posterior = [p[window[0]] for p in chains.stationary_SV]
    posterior = [p / sum(posterior) for p in posterior]
    for now, then in itertools.pairwise(window):
      likelihood = [p[now, then] for p in chains.transition_SVV]
      prediction = sum(q * p for q, p in zip(posterior, likelihood, strict=True))
      total -= math.log(prediction)
      posterior = [q * p / prediction for q, p in zip(posterior, likelihood, strict=True)]
  return total / (len(windows) * (windows.shape[1] - 1))


def test_stationary_distribution_and_entropy_rate():
  rate = 0.0
  for p, pi in zip(CHAINS.transition_SVV, CHAINS.stationary_SV, strict=True):
    np.testing.assert_allclose(pi, np.linalg.matrix_power(p, 200)[0], atol=1e-12)
    rate -= sum(pi[i] * p[i, j] * math.log(p[i, j]) for i in range(5) for j in range(5)) / 3
  assert CHAINS.entropy_rate == pytest.approx(rate, rel=1e-12)


def test_windows_follow_the_chains():
  windows, domains = windows_of(CHAINS, 3000, 20)
  nll = 0.0
  for d in range(3):
    own = windows[domains == d]
    assert len(own) == pytest.approx(1000, abs=110)
    first = np.bincount(own[:, 0], minlength=5) / len(own)
    np.testing.assert_allclose(first, CHAINS.stationary_SV[d], atol=0.06)
    counts = np.zeros((5, 5))
    np.add.at(counts, (own[:, :-1], own[:, 1:]), 1)
    np.testing.assert_allclose(counts / counts.sum(1, keepdims=True), CHAINS.transition_SVV[d], atol=0.04)
    nll -= np.log(CHAINS.transition_SVV[d][own[:, :-1], own[:, 1:]]).sum() / (3000 * 20)
  assert nll == pytest.approx(CHAINS.entropy_rate, abs=0.015)  # Monte Carlo, 60,000 tokens


def test_floor_equals_bayes_rule_by_hand_and_lies_above_the_entropy_rate():
  windows, _ = windows_of(CHAINS, 4000, 4)
  assert CHAINS.optimal_nll(windows[:200]) == pytest.approx(loop_nll(CHAINS, windows[:200]), rel=1e-12)
  # short windows: the domain is still uncertain, which costs at most log(S) / L
  floor = CHAINS.optimal_nll(windows)
  assert CHAINS.entropy_rate + 0.03 < floor < CHAINS.entropy_rate + math.log(3) / 4
  one = MarkovChains(1, 5, 0.5)
  single, _ = windows_of(one, 50, 6)
  known = -np.log(one.transition_SVV[0][single[:, :-1], single[:, 1:]]).mean()
  assert one.optimal_nll(single) == pytest.approx(known, rel=1e-12)


def test_no_model_beats_the_floor():
  windows, _ = windows_of(CHAINS, 500, 12)
  floor = CHAINS.optimal_nll(windows)
  mean_chain = MarkovChains(1, 5, 0.5)
  mean_chain.transition_SVV = CHAINS.transition_SVV.mean(0, keepdims=True)
  mean_chain.stationary_SV = CHAINS.stationary_SV.mean(0, keepdims=True)
  assert mean_chain.optimal_nll(windows) > floor + 0.02


def test_data_set():
  dataset = load_dataset(config(dataset="markov", markov_domains=3, markov_states=16))
  info = dataset.info
  assert info.vocab_size == 16 and info.domains == ("chain0", "chain1", "chain2")
  batches = list(dataset.validation_batches(64))
  windows = np.concatenate([np.c_[b["tokens_BL"], b["targets_BL"][:, -1]] for b in batches])
  assert len(windows) == info.num_windows["validation"]
  assert MarkovChains(3, 16, 1.0).optimal_nll(windows) == pytest.approx(info.validation_floor, rel=1e-12)
  assert all(b["mask_BL"].all() for b in batches)
  assert abs(info.validation_floor - info.entropy_rate) < 0.1
  assert sum(info.targets_per_domain["validation"]) == windows.shape[0] * 32


def test_chains_do_not_depend_on_data_seed_and_splits_differ():
  infos = [load_dataset(config(dataset="markov", markov_states=8, data_seed=s)).info for s in (0, 1)]
  assert infos[0] == infos[1]
  other = load_dataset(config(dataset="markov", markov_states=8, markov_temperature=0.9)).info
  assert other.fingerprint != infos[0].fingerprint
  train, _ = windows_of(CHAINS, 20, 30, "train")
  validation, _ = windows_of(CHAINS, 20, 30)
  assert not {tuple(w) for w in train} & {tuple(w) for w in validation}


def test_colder_is_more_predictable_down_to_one_successor():
  rates = [MarkovChains(2, 16, t).entropy_rate for t in (4.0, 1.0, 0.3, 0.01, 1e-4)]
  assert rates == sorted(rates, reverse=True) and rates[0] < math.log(16) and rates[-1] < 1e-6
