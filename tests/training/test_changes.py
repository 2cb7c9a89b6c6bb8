"""What makes two configurations different runs."""

import pytest

from moe_jax.training.changes import changes
from tests import tiny


def of(**fields):
  return tiny.change(tiny.CONFIG, **{"schedule": "constant", "warmup_steps": 20, **fields}).to_dict()


@pytest.mark.parametrize("fields", [{"warmup_steps": 2}, {"warmup_steps": 0}])
def test_a_constant_schedule_whose_warm_up_stays_can_be_extended(fields):
  assert changes(of(num_steps=4, **fields), of(num_steps=8, **fields)) == []


def test_a_warm_up_that_would_grow_with_the_steps_is_the_reason():
  (line,) = changes(of(num_steps=4), of(num_steps=8))
  assert line.startswith(
    "warm-up was 2 of 4 steps, now 4 of 8: --warmup_steps=20 is cut to half of the steps, "
  )
  first, second = changes(of(num_steps=4), of(num_steps=8, learning_rate=0.5))
  assert first == line and second.startswith("learning_rate was ")


def test_other_changes_of_the_steps_name_the_fields():
  assert changes(of(num_steps=8), of(num_steps=4)) == ["num_steps was 8, now 4"]
  found = changes(of(num_steps=4), of(num_steps=8, warmup_steps=4))
  assert sorted(found) == ["num_steps was 4, now 8", "warmup_steps was 20, now 4"]
  cosine = {"schedule": "cosine"}
  assert changes(of(num_steps=4, **cosine), of(num_steps=8, **cosine)) == ["num_steps was 4, now 8"]
  found = changes(of(num_steps=40, **cosine), of(num_steps=80))
  assert any(line.startswith("schedule was ") for line in found)
