"""How routes of two models are compared, and the text they are compared on."""

import dataclasses

import numpy as np
import pytest

from moe_jax.adapt import quantise
from moe_jax.adapt.routes import changed_routes, max_vio, selected
from moe_jax.adapt.table import calibration_batches, has_training_text, row, write_table
from moe_jax.data import load_dataset
from moe_jax.data.prompts import Example, prompt_dataset
from moe_jax.data.tokenizers import load_tokenizer
from moe_jax.errors import InputError
from moe_jax.inference.evaluate import Score
from tests import tiny
from tests.adapt import models

BATCHES = [tiny.make_batch(seed=0), tiny.make_batch(seed=1)]


def test_a_model_does_not_change_its_own_routes():
  np.testing.assert_array_equal(changed_routes(models.model(), models.model(), BATCHES), [0, 0])


def test_changed_routes_and_max_vio_equal_loops():
  one, other = models.model(), models.model(seed=1)
  changed, total, tokens = np.zeros(2), 0, np.zeros((2, 8))
  for batch in BATCHES:
    a, b = selected(one, batch), selected(other, batch)
    for index in np.ndindex(8, 16):
      if not batch["mask_BL"][index]:
        continue
      total += 2
      for layer in range(2):
        own, others = (set(np.flatnonzero(x[(layer, *index)])) for x in (a, b))
        changed[layer] += len(own - others)
        tokens[layer] += a[(layer, *index)]
  np.testing.assert_allclose(changed_routes(one, other, BATCHES), changed / total, rtol=1e-6)
  np.testing.assert_allclose(max_vio(one, BATCHES), tokens.max(axis=1) / tokens.mean(axis=1) - 1, rtol=1e-6)
  first_layer = changed_routes(one, quantise(one, "int4"), BATCHES)[0]
  assert first_layer == 0  # no expert is before it


def test_models_with_other_numbers_of_experts_have_no_common_routes():
  with pytest.raises(InputError, match=r"changed_routes: .* must be equal"):
    few = dataclasses.replace(models.CONFIG, moe=dataclasses.replace(models.SPARSE, num_experts=4))
    changed_routes(models.model(), models.model(few), BATCHES)


def test_calibration_text_of_one_domain():
  dataset = load_dataset(tiny.CONFIG.data)
  name = dataset.info.domains[1]
  for batch in calibration_batches(dataset, 2, name):
    assert set(batch["domain_B"][batch["mask_BL"].any(axis=1)]) == {1}
  assert all(batch["mask_BL"].all() for batch in calibration_batches(dataset, 2))
  with pytest.raises(InputError, match="unknown domain 'x'"):
    calibration_batches(dataset, 1, "x")


def test_a_domain_without_training_text_is_refused():  # of which no batch would ever come
  examples = [Example("a", "b", "one"), Example("c", "d", "two"), Example("e", "f", "new")]
  data = dataclasses.replace(tiny.CONFIG.data, sequence_length=8, batch_size=2)
  dataset = prompt_dataset(data, examples[:2], examples[2:], load_tokenizer("bytes"))
  assert [has_training_text(dataset, name) for name in ("one", "two", "new")] == [True, True, False]
  assert len(calibration_batches(dataset, 2, "one")) == 2
  with pytest.raises(InputError, match=r"--domain=new: has no training text, .*; choose one of one, two"):
    calibration_batches(dataset, 1, "new")
  chains = load_dataset(tiny.CONFIG.data)  # whose training text is not counted
  assert has_training_text(chains, chains.info.domains[0])


def test_a_table_has_a_line_per_row(tmp_path, capsys):
  rows = [row("whole", 8, {"all": Score(0.5, 10, 0)}), row("usage", 4, {"all": Score(np.log(2), 10, 20)})]
  write_table(tmp_path / "a" / "t.csv", rows)
  assert (tmp_path / "a" / "t.csv").read_text().splitlines() == [
    "method,experts,all",
    "whole,8,0.5",
    "usage,4,0.5",
  ]
  assert "0.5000" in capsys.readouterr().out
