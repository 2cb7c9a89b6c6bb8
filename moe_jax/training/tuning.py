"""What a trained model is trained on with: on text, and on prompts with responses."""

from moe_jax import disk
from moe_jax.config import Config
from moe_jax.errors import InputError
from moe_jax.registry import Spec
from moe_jax.training.compiled import objective_of
from moe_jax.training.objectives import Distil, Response


def objective_for(config: Config, has_responses: bool, where: str) -> Spec:
  """Returns the objective with which a model goes on: `response` on prompts, on text its own.

  On text, one that distils or reads responses is replaced by `next_token`, by which the model is measured, and a line says so: a
  teacher that is not asked for would go on teaching, and text has no responses.

  Args:
    config: of the model, resolved.
    has_responses: whether the data set is of prompts with responses.
    where: the model, for messages.

  Raises:
    InputError: if there are responses, and the model sees later tokens.
  """
  if has_responses:
    check_causal(config, where, "so it writes no responses; tune it on text, or choose a causal model")
    return "response"
  own = config.train.objective
  if not isinstance(objective_of(config), Distil | Response):
    return own
  disk.note(f"{where}: was trained with {own}, and is tuned with next_token, by which it is measured on text")
  return "next_token"


def check_causal(config: Config, where: str, right: str) -> None:
  """Raises `InputError`, which ends with `right`, if the model of a resolved configuration sees later tokens."""
  if not config.model.causal:
    raise InputError(f"{where}: sees later tokens (objective {config.train.objective}), {right}")
