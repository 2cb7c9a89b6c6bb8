"""What a layer is given and what is read of it, in a training loop of one's own: all of it counts, or is refused."""

import jax
import numpy as np
import pytest
from flax import nnx

import moe_jax
from moe_jax.errors import InputError
from moe_jax.nn import Context, MoE
from tests.nn.layer import B, D, L, forward, inputs, make


def test_the_aux_of_layers_may_be_in_any_tree():
  moe = make(balancer="switch_loss:0.5")
  a, b = (forward(moe, x_BLD)[1] for x_BLD in (inputs(), 2 * inputs()))
  expected = float(a.loss + b.loss)
  assert expected > 0.5
  for tree in ((a, b), [a, b], ((a,), (b,)), {"l0": a, "l1": b}, {"l": [a, {"m": b}]}, {"l": (a,), "m": b}):
    assert float(moe_jax.balancing_loss(tree)) == pytest.approx(expected, rel=1e-6)
    read = moe_jax.read_metrics(tree)["max_vio"]
    np.testing.assert_allclose(read, np.ravel([moe_jax.read_metrics(x)["max_vio"] for x in (a, b)]))
  assert moe_jax.balancing_loss({"dense": None}) == 0.0


@pytest.mark.parametrize(
  ("field", "shape"),
  [
    ("mask_BL", (L, B)),
    ("mask_BL", (B * L,)),
    ("token_id_BL", (L, B)),
    ("domain_B", (B, 1)),
    ("segment_BL", (L, B)),
  ],
)
def test_a_field_of_another_shape_is_refused(field, shape):
  with pytest.raises(InputError, match=rf"context: {field} has the shape .*; it must be \[B.*\] = \[{B}"):
    make()(inputs(), Context(**{field: np.ones(shape, np.int32)}))


@pytest.mark.parametrize(
  ("domains", "fields"),
  [([0, 1, 2], {}), ([0, 2, 1], {"num_domains": 2}), ([0, -1, 0], {"num_domains": 2})],
)
def test_a_domain_that_is_not_counted_is_refused(domains, fields):
  """It would be left out of the information about domains, without a word."""
  domain_B = np.resize(domains, B)
  with pytest.raises(InputError, match=r"domain_B has .*, and num_domains is"):
    make()(inputs(), Context(domain_B=domain_B, **fields))
  forwarded = jax.jit(
    lambda moe, x, d: moe(x, Context(domain_B=d, **fields))[1]
  )  # where nobody can look at numbers
  information = moe_jax.read_metrics(forwarded(make(), inputs(), domain_B))["mutual_information"]
  assert np.isnan(information).all()


def test_a_task_without_experts_has_none_of_another():
  moe = make(router="task_level:tasks=2", balancer="none", dispatcher="dropless")
  forwarded = jax.jit(lambda moe, x, d: moe(x, Context(domain_B=d, num_domains=9))[0])
  y_BLD = np.asarray(forwarded(moe, inputs(), np.resize([1, 2], B)))
  assert np.isfinite(y_BLD[0]).all() and np.isnan(y_BLD[1]).all()


def test_flat_tokens_have_flat_fields():
  moe, x_TD = make(dispatcher="dropless", balancer="none"), inputs()[0]
  mask_T = np.arange(L) < 5
  _, aux = moe(x_TD, Context(mask_BL=mask_T))
  assert aux.kept_per_expert_E.sum() == 5 * 2
  assert moe(x_TD, Context(domain_B=1, num_domains=2))[1].kept_per_expert_E.sum() == L * 2
  with pytest.raises(InputError, match="domain_B has 2, and num_domains is 2"):
    moe(x_TD, Context(domain_B=np.int32(2), num_domains=2))
  with pytest.raises(InputError, match="mask_BL has the shape"):
    moe(x_TD, Context(mask_BL=mask_T[:-1]))


@pytest.mark.parametrize(
  "fields",
  [
    {"capacity_factor": 0.0},
    {"capacity_factor": float("nan")},
    {"eval_capacity_factor": -1.0},
    {"jitter": 5.0},
    {"init_scale": -1.0},
    {"init_scale": float("nan")},
    {"expert_dim": 0},
    {"group_size": -1},
    {"num_experts_per_token": 9},
  ],
  ids=str,
)
def test_numbers_that_make_no_sense_are_refused(fields):
  (name,) = fields
  with pytest.raises(InputError, match=f"^{name}="):
    MoE(D, **fields, rngs=nnx.Rngs(0))


def test_groups_must_divide_the_tokens():
  with pytest.raises(InputError, match=rf"group_size=5: must divide the {B * L} tokens"):
    make(group_size=5)(inputs())
