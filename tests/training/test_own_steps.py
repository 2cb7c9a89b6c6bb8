"""Wrong hooks and optimizers of a user's own: one line that names the flag and the part, before anything is trained."""

import jax
import jax.numpy as jnp
import optax
import pytest

import moe_jax
from moe_jax import sharding
from moe_jax.errors import InputError
from moe_jax.training.compiled import check_run
from tests import tiny

KEPT = "or no checkpoint of the run could be read"


def check(**fields):
  return check_run(tiny.change(tiny.CONFIG, **fields), sharding.make_mesh(tiny.ONE_DEVICE))


def is_refused(message, **fields):
  with pytest.raises(InputError, match=message) as error:
    check(**fields)
  assert "\n" not in str(error.value)


def hook_of(start, after):
  """A hook with the state `start`, which becomes `after(model, state)`."""
  functions = {
    "init": lambda self, model: start(),
    "__call__": lambda self, model, state, aux: after(model, state),
  }
  return type("own", (moe_jax.Hook,), functions)


def to_bfloat16(model, state):
  model.embedding_VD.set_value(model.embedding_VD[...].astype(jnp.bfloat16))
  return state


def branch(model, state):
  return state if state > 0 else -state


ZERO = lambda: jnp.int32(0)


@pytest.mark.parametrize(
  ("start", "after", "message"),
  [
    (ZERO, lambda model, state: state + 0.5, f"changes its state from int32 to float32; .* {KEPT}"),
    (lambda: {"n": 0}, lambda model, state: {"n": 0.5}, "changes its state n from int32 to float32;"),
    (
      lambda: jnp.zeros(1),
      lambda model, state: jnp.append(state, 1),
      r"changes its state from float32\[1\] to float32\[2\];",
    ),
    (
      lambda: {"n": 0},
      lambda model, state: {**state, "m": 0},
      r"changes its state m from nothing to int32\[\];",
    ),
    (tuple, lambda model, state: None, "changes its state from a tuple to a NoneType,"),
    (tuple, to_bfloat16, "changes the model's embedding_VD from float32 to bfloat16;"),
    (lambda: jax.random.key(0), lambda model, state: state, "its state is a typed random key, which"),
    (ZERO, branch, r".*test_own_steps.py:4\d\): fails: TracerBoolConversionError"),
  ],
)
def test_a_wrong_hook_is_named(start, after, message):
  is_refused(f"^--hooks=own: hook own.*{message}", hooks=hook_of(start, after))


def optimizer_of(init, update):
  def own(learning_rate):
    return optax.GradientTransformation(init, update)

  return own


def zeros_like(updates, state, params):
  return jax.tree.map(jnp.zeros_like, updates), state


def plateau(learning_rate):
  return optax.chain(optax.sgd(learning_rate), optax.contrib.reduce_on_plateau())


def noisy(learning_rate):
  return optax.noisy_sgd(learning_rate, key=0)


def scalars(updates, state, params):
  return jax.tree.map(jnp.sum, updates), state


@pytest.mark.parametrize(
  ("optimizer", "message"),
  [
    (
      optimizer_of(lambda params: jnp.int32(0), lambda updates, state, params: (updates, state + 1.0)),
      f"own: changes its state from int32 to float32; .* {KEPT}",
    ),
    (
      optimizer_of(lambda params: (), scalars),
      "own: its updates have other shapes than the parameters: .* from",
    ),
    (plateau, r"plateau \(.*test_own_steps.py:\d+\): fails: TypeError: .*'value'"),
    (noisy, "noisy: its state 0.rng_key is a typed random key, which a checkpoint cannot hold"),
    (lambda learning_rate: None, r".*test_own_steps.py:\d+\): makes a NoneType, which is no optax"),
  ],
)
def test_a_wrong_optimizer_is_named(optimizer, message):
  is_refused(f"^--optimizer=.*: optimizer {message}", optimizer=optimizer)


def test_what_makes_no_hook_is_named():
  is_refused(
    r"^--hooks=.*: hook .*test_own_steps.py:\d+\): makes a NoneType, which is no Hook", hooks=lambda: None
  )


def averaged_pairs(learning_rate):
  return optax.MultiSteps(optax.adam(learning_rate), 2)


def test_right_ones_pass():
  counting = hook_of(lambda: {"n": 0}, lambda model, state: {"n": state["n"] + 1})
  check(hooks=("average_parameters", counting), optimizer=averaged_pairs)
  check(hooks=counting, objective="masked_lm", optimizer=optimizer_of(lambda params: (), zeros_like))
