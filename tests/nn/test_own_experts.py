"""Experts of a user's own that mix hidden units are refused where devices would have parts of these."""

import jax
import jax.numpy as jnp
import pytest

import moe_jax
from moe_jax import sharding
from moe_jax.config import MeshConfig
from moe_jax.errors import InputError
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
  from moe_jax.nn.experts import EXPERTS

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
