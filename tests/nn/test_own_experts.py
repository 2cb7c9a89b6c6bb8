"""Experts of a user's own: refused if empty slots spoil a layer, and where they mix hidden units that devices share."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import moe_jax
from moe_jax import sharding
from moe_jax.config import MeshConfig
from moe_jax.errors import InputError
from moe_jax.nn import MoE
from moe_jax.nn.experts import EXPERTS
from moe_jax.nn.experts.base import INTO, OUT
from moe_jax.training.compiled import check_run
from tests import tiny

WHOLE = (*INTO[:2], None), (OUT[0], None, OUT[2])


class own(moe_jax.ExpertNetwork):
  """Softplus experts with an output bias, which subclasses spoil."""

  axes = INTO, OUT

  def __init__(self, num_experts, dim, expert_dim, *, rngs):
    into, out = self.axes
    self.width = expert_dim
    self.w_up_EDF = moe_jax.matrix(rngs, (num_experts, dim, expert_dim), into)
    self.w_down_EFD = moe_jax.matrix(rngs, (num_experts, expert_dim, dim), out)
    self.b_down_ED = moe_jax.vector(jnp.zeros((num_experts, dim)), ("expert", "embed"))

  def __call__(self, rows, product):
    hidden = product.hidden(self.mixed(jax.nn.softplus(product(rows, self.w_up_EDF[...]))))
    return product(hidden, self.w_down_EFD[...]) + product.per_row(self.b_down_ED[...]) / self.of(product)

  def mixed(self, hidden):
    return hidden

  def of(self, product):
    return product.parts


def spoilt(**attributes):
  return type("own", (own,), attributes)


def rms_norm(self, hidden):
  return hidden * jax.lax.rsqrt(jnp.mean(hidden**2, axis=-1, keepdims=True) + 1e-6)


def by_width(self, hidden):
  return hidden.reshape(*hidden.shape[:-1], 2, self.width // 2).reshape(hidden.shape)


def in_bfloat16(self, hidden):
  return hidden.astype(jnp.bfloat16).astype(hidden.dtype)


def check(experts, dispatcher="dropless", tensor=2, **fields):
  mesh = MeshConfig(data=1, tensor=tensor)
  config = tiny.change(tiny.CONFIG, experts=experts, dispatcher=dispatcher, mesh=mesh, **fields)
  check_run(config, sharding.make_mesh(mesh))


def to_nan(self, hidden):
  return hidden * jnp.nan


WRONG = {
  "nan": (
    {"mixed": to_nan},
    "nothing is known of it in 2 parts: on a tiny batch it is nan; use the dispatcher",
  ),
  "rms_norm": ({"mixed": rms_norm}, r"2 parts \(tensor\) do not add up to the whole"),
  "softmax": ({"mixed": lambda self, hidden: jax.nn.softmax(hidden)}, "do not add up to the whole"),
  "bias": (
    {"of": lambda self, product: 1},
    "do not add up to the whole .* divide what no hidden unit has by",
  ),
  "axes": ({"axes": WHOLE}, "do not add up to the whole .* name their axis mlp"),
  "by_width": (
    {"mixed": by_width},
    r"fails with its hidden units in 2 parts \(TypeError: .*\); use the dispatcher",
  ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_cannot_be_cut_is_named(kind):
  attributes, message = WRONG[kind]
  with pytest.raises(InputError, match=rf"^--experts=own: experts own \(.*\): .*{message}") as error:
    check(spoilt(**attributes))
  assert "\n" not in str(error.value)


def test_it_may_be_whole():
  wrong = spoilt(mixed=rms_norm)
  check(wrong, tensor=1)
  check(wrong, "sorted")
  check(wrong, "einsum")


@pytest.mark.parametrize("mixed", [own.mixed, in_bfloat16])
@pytest.mark.parametrize("tensor", [2, 4])
def test_what_can_be_cut_passes(mixed, tensor):
  check(spoilt(mixed=mixed), tensor=tensor, num_heads=4)


def test_experts_within_others_are_tried_too(monkeypatch):
  monkeypatch.setitem(EXPERTS._factories, "normed", spoilt(mixed=rms_norm))
  monkeypatch.setitem(EXPERTS._factories, "softplus", own)
  with pytest.raises(
    InputError, match=r"^--experts=expert_dropout:experts=normed: .* do not add up to the whole"
  ):
    check("expert_dropout:experts=normed")
  check("expert_dropout:experts=softplus")


def test_a_width_that_is_not_divided_is_what_is_named():
  with pytest.raises(InputError, match="--expert_dim=15: must be a multiple of --tensor_parallelism=2"):
    check(own, expert_dim=15)


def unit(self, hidden):
  return hidden / jnp.linalg.norm(hidden, axis=-1, keepdims=True)


def by_norm(self, hidden):
  """Finite at 0, where the derivative of the norm is not."""
  return hidden * jnp.linalg.norm(hidden, axis=-1, keepdims=True)


def with_epsilon(self, hidden):
  return hidden * jax.lax.rsqrt(jnp.sum(hidden**2, axis=-1, keepdims=True) + 1e-6)


class linear(own):
  """Hidden units of a row of zeros are zeros."""

  def __call__(self, rows, product):
    hidden = self.mixed(product(rows, self.w_up_EDF[...]))
    return product(hidden, self.w_down_EFD[...])


def network(mixed):
  return type("own", (linear,), {"mixed": mixed})


@pytest.mark.parametrize("dispatcher", ["einsum", "dropless"])
@pytest.mark.parametrize(("mixed", "what"), [(unit, "output"), (by_norm, "gradient")])
def test_what_empty_slots_spoil_is_named(mixed, what, dispatcher):
  message = (
    rf"^--experts=own: experts own \(.*\): the {what} is not finite for rows of zeros, .* add an epsilon"
  )
  with pytest.raises(InputError, match=message) as error:
    check(network(mixed), dispatcher, tensor=1)
  assert "\n" not in str(error.value)


def test_what_empty_slots_spoil_is_named_inside_of_another_network(monkeypatch):
  monkeypatch.setitem(EXPERTS._factories, "unit", network(unit))
  for name in ("expert_dropout", "quantised", "fp8_products"):
    with pytest.raises(
      InputError, match=rf"^--experts={name}:experts=unit: .* output is not finite for rows"
    ):
      check(f"{name}:experts=unit", tensor=1)


@pytest.mark.parametrize("mixed", [own.mixed, with_epsilon])
def test_what_is_finite_on_empty_slots_passes(mixed, capsys):
  check(network(mixed), "einsum", tensor=1)
  assert "not tried" not in capsys.readouterr().err


def test_why_empty_slots_are_refused():
  """One expert gets no token. The layer is spoilt by a network that is refused, and by no other."""
  x_BLD = jax.random.normal(jax.random.key(0), (1, 4, 8))

  def is_finite(mixed):
    made = network(mixed)(4, 8, 16, rngs=nnx.Rngs(0))
    sizes = {"num_experts": 4, "num_experts_per_token": 1, "expert_dim": 16, "dispatcher": "einsum"}
    layer = MoE(8, experts=made, **sizes, rngs=nnx.Rngs(0))
    value, gradient = jax.jit(nnx.value_and_grad(lambda layer: layer(x_BLD)[0].sum()))(layer)
    return all(jnp.isfinite(x).all() for x in jax.tree.leaves((value, gradient)))

  assert [is_finite(mixed) for mixed in (own.mixed, with_epsilon, unit, by_norm)] == [
    True,
    True,
    False,
    False,
  ]


def test_experts_that_do_not_take_the_sizes_of_the_trial_are_not_refused(capsys):
  def few(self, hidden):
    if hidden.shape[0] == 2:
      raise ValueError("takes more experts")
    return unit(self, hidden)

  check(network(few), "einsum", tensor=1)
  assert "--experts=own (" in (said := capsys.readouterr().err) and "takes more experts" in said
