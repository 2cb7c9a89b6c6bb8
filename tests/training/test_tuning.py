"""What a model goes on with: its own objective on text, responses on prompts, and no teacher that nobody asked for."""

import pytest

from moe_jax.errors import InputError
from moe_jax.training.compiled import resolve_config
from moe_jax.training.tuning import objective_for
from tests import tiny


def config(objective):
  return resolve_config(tiny.change(tiny.CONFIG, objective=objective))


@pytest.mark.parametrize(
  "objective", ["next_token", "response", "distil:teacher=t", "distil_response:teacher=t"]
)
def test_prompts_are_tuned_on_their_responses(objective, capsys):
  assert objective_for(config(objective), True, "--model=m") == "response"
  assert not capsys.readouterr().err


@pytest.mark.parametrize("objective", ["response", "distil:teacher=t:soft=0.5", "distil_response:teacher=t"])
def test_text_has_no_responses_and_no_teacher(objective, capsys):
  assert objective_for(config(objective), False, "--model=m") == "next_token"
  line = (
    f"--model=m: was trained with {objective}, and is tuned with next_token, by which it is measured on text"
  )
  assert line in capsys.readouterr().err


@pytest.mark.parametrize("objective", ["next_token", "masked_lm:0.3"])
def test_on_text_a_model_keeps_its_own_objective(objective, capsys):
  assert str(objective_for(config(objective), False, "--model=m")) == objective
  assert not capsys.readouterr().err


def test_a_model_that_sees_later_tokens_writes_no_responses():
  with pytest.raises(
    InputError, match=r"^--model=m: sees later tokens \(objective masked_lm\), so it writes no"
  ):
    objective_for(config("masked_lm"), True, "--model=m")
