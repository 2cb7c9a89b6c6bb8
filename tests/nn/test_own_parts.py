"""Wrong routers, experts and mixers of a user: one line that names the flag and the part, before anything is compiled."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import moe_jax
from moe_jax import ModelConfig, MoEConfig
from moe_jax.errors import InputError
from moe_jax.nn import MoE
from moe_jax.nn.build import resolve, resolve_moe, routed_layer
from moe_jax.nn.experts import EXPERTS
from moe_jax.nn.experts.base import INTO, OUT
from moe_jax.nn.ffn import FFNS
from moe_jax.nn.mixers import MIXERS
from moe_jax.nn.own_parts import check_router
from moe_jax.nn.routers import ROUTERS

E, K = 8, 2


class own(moe_jax.Router):
  """A plain top-k router, which subclasses spoil."""

  def __init__(self, dim, num_experts, num_experts_per_token, *, rngs):
    self.k = num_experts_per_token
    self.w_DE = moe_jax.matrix(rngs, (dim, self.logits or num_experts), ("embed", "router"))

  logits = 0

  def __call__(self, x_GTD, context):
    return self.spoilt(moe_jax.top_k(moe_jax.project(x_GTD, self.w_DE[...]), self.k, context))

  def spoilt(self, routing):
    return routing


def router_of(function):
  return type("own", (own,), {"spoilt": lambda self, routing: function(routing)})


def entries(**functions):
  """A router that changes fields of the assignment."""

  def spoilt(routing):
    a = routing.assignment
    return routing._replace(
      assignment=a._replace(**{f: change(getattr(a, f)) for f, change in functions.items()})
    )

  return router_of(spoilt)


def first_of_token(expert_GA):
  return jnp.repeat(expert_GA[:, ::K], K, axis=1)


def error_of(**parts):
  with pytest.raises(InputError) as error:
    moe_fields = {name: parts.pop(name) for name in ("router", "experts") if name in parts}
    resolve(ModelConfig(moe=MoEConfig(E, K, 8, **moe_fields), **parts))
  text = str(error.value)
  assert "\n" not in text
  return text


WRONG = {
  "expert_A has ids from 1 to 8; they must be from 0 to 7": entries(expert_A=lambda e: e + 1),
  "expert_A has ids from -1 to 6; they must be from 0 to 7": entries(expert_A=lambda e: e - 1),
  "token_A has ids from 1 to 64; they must be from 0 to 63": entries(token_A=lambda t: t + 1),
  "sends a token to the same expert twice": entries(expert_A=first_of_token),
  "sends padding to experts; valid_A must be False": entries(valid_A=jnp.ones_like),
  "weight_A has values that are not finite": entries(weight_A=lambda w: w * jnp.nan),
  "expert_A is float32[2, 128]; it must be integer [G, A] = [2, 128]": entries(
    expert_A=lambda e: e.astype(jnp.float32)
  ),
  "valid_A is int32[2, 128]; it must be bool [G, A]": entries(valid_A=lambda v: v.astype(jnp.int32)),
  "weight_A is float32[2, 64]; it must be float [G, A] = [2, 128]": entries(weight_A=lambda w: w[:, ::2]),
  "returns a value of type tuple; it must return a moe_jax.types.Routing": router_of(tuple),
  "returns a value of type Array; it must": router_of(lambda r: r.logits_TE),
  "mask_T is None; it must be bool [G, T] = [2, 64]": router_of(lambda r: r._replace(mask_T=None)),
  "mask_T differs from context.mask": router_of(lambda r: r._replace(mask_T=r.mask_T.at[:].set(True))),
  "log_scores_TE has NaN": router_of(lambda r: r._replace(log_scores_TE=r.log_scores_TE * jnp.nan)),
  "logits_TE is float32[64, 8]; it must be float [G, T, E] = [2, 64, 8]": router_of(
    lambda r: jax.tree.map(lambda x: x[0], r)
  ),
  "logits_TE is float32[2, 64, 9]; it must be float [G, T, E] = [2, 64, 8]": type(
    "own", (own,), {"logits": 9}
  ),
  "scores 9 experts, of which 8 have a network, and sets no direct_TD": type(
    "own", (own,), {"logits": 9, "num_scored_experts": 9}
  ),
  "smooth_load_TE is None": type("own", (own,), {"gives_smooth_load": True}),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_router_is_named(message):
  assert error_of(router=WRONG[message]).startswith(f"--router=own: router own: {message}")


@pytest.mark.parametrize("name", ["softmax_topk", "merged_topk:logits=12", "expert_choice", "longcat_topk"])
def test_those_of_the_package_pass(name):
  moe = resolve_moe(MoEConfig(E, K, 8, router=name))
  check_router(moe.router, moe.balancers, routed_layer(moe))


def test_a_right_router_passes_also_inside_of_a_traced_function():
  config = ModelConfig(num_layers=1, moe=MoEConfig(E, K, 8, router=own))
  make = lambda: nnx.state(moe_jax.Transformer(config, 16, rngs=nnx.Rngs(0)))
  with jax.set_mesh(jax.make_mesh((1,), ("data",))):
    jax.eval_shape(make)


def test_a_router_that_does_not_take_the_sizes_of_the_trial_is_not_refused():
  def rows(routing):
    if routing.mask_T.shape[1] != 48:
      raise ValueError("takes 48 tokens")
    return routing

  routed_layer(MoEConfig(E, K, 8, router=router_of(rows)))


def test_a_layer_names_a_router_that_it_was_given():
  layer = MoE(8, router=router_of(tuple), rngs=nnx.Rngs(0))
  with pytest.raises(InputError, match=r"^router own: returns a value of type tuple"):
    layer(jnp.ones((1, 4, 8)))


class Count(nnx.Variable):
  pass


class stateful(own):
  def __init__(self, dim, num_experts, num_experts_per_token, *, rngs):
    super().__init__(dim, num_experts, num_experts_per_token, rngs=rngs)
    self.mean = Count(jnp.zeros(()))

  def spoilt(self, routing):
    self.mean.set_value(routing.logits_TE.mean())
    return routing


class network(moe_jax.ExpertNetwork):
  def __init__(self, num_experts, dim, expert_dim, *, rngs, axes=INTO, counts=False):
    self.w_up_EDF = moe_jax.matrix(rngs, (num_experts, dim, expert_dim), axes)
    self.w_down_EFD = moe_jax.matrix(rngs, (num_experts, expert_dim, dim), OUT)
    self.count = Count(jnp.zeros(num_experts), logical_axes=("expert",)) if counts else None

  def __call__(self, rows, product):
    if self.count is not None:
      self.count.set_value(self.count.get_value() + 1)
    return product(product(rows, self.w_up_EDF[...]), self.w_down_EFD[...])


class mixer(nnx.Module):
  def __init__(self, dim, *, rngs, kind="right"):
    self.w_DD = moe_jax.matrix(rngs, (dim, dim), ("embed",) if kind == "axes" else ("embed", None))
    self.proj = nnx.Linear(dim, dim, rngs=rngs) if kind == "linear" else None
    self.seen, self.kind = Count(jnp.zeros(())), kind

  def __call__(self, x_BLD, context):
    y_BLD = x_BLD @ moe_jax.weight(self.w_DD, x_BLD.dtype)
    if self.kind == "stateful":
      self.seen.set_value(self.seen.get_value() + 1)
    if self.kind == "anneals":
      self.w_DD.set_value(self.w_DD[...] * 0.9)
    return {"alone": y_BLD, "wide": (y_BLD.astype(jnp.float32), None)}.get(self.kind, (y_BLD, None))


def test_state_that_would_be_lost_is_named():
  lost = "changes in the forward pass, and is lost; use a balancer or a hook"
  text = error_of(router=stateful)
  assert text == f"--router=stateful: router stateful: its variable mean {lost}"
  text = error_of(experts=functools.partial(network, counts=True))
  assert (
    text.startswith("--experts=network:counts=true: experts network: its variable count ") and lost in text
  )
  text = error_of(mixer=functools.partial(mixer, kind="stateful"))
  assert text == f"--mixer=mixer:kind=stateful: mixer mixer: its variable seen {lost}"


def test_state_that_a_part_inside_of_another_loses_is_named():
  lost = "changes in the forward pass, and is lost; use a balancer or a hook"
  text = error_of(router=functools.partial(ROUTERS["merged_topk"], router=stateful))
  assert text.endswith(f"router merged_topk: its variable router.mean {lost}")
  of = functools.partial(network, counts=True)
  for name in ("expert_dropout", "low_rank", "quantised", "quantised_training", "fp8_products"):
    text = error_of(experts=functools.partial(EXPERTS[name], experts=of))
    assert text.startswith(f"--experts={name}:experts=network;counts=true: experts ")
    assert "count changes in" in text
  text = error_of(
    mixer=functools.partial(MIXERS["low_rank"], mixer=functools.partial(mixer, kind="stateful"))
  )
  what = "mixer low_rank:mixer=mixer;kind=stateful"
  assert text == f"--mixer={what.removeprefix('mixer ')}: {what}: its variable seen {lost}"
  text = error_of(ffn=functools.partial(FFNS["low_rank"], ffn=functools.partial(mixer, kind="anneals")))
  what = "ffn low_rank:ffn=mixer;kind=anneals"
  assert text == f"--ffn={what.removeprefix('ffn ')}: {what}: its variable w_DD {lost}"


def test_a_parameter_that_a_forward_pass_changes_is_named():
  text = error_of(mixer=functools.partial(mixer, kind="anneals"))
  assert text.startswith("--mixer=mixer:kind=anneals: mixer mixer: its variable w_DD changes in the forward")


class residual(nnx.Module):
  def __init__(self, dim, *, kind="right"):
    self.scale_D, self.kind = moe_jax.vector(jnp.ones(dim), ("norm",)), kind
    self.seen = Count(jnp.zeros(()))

  def __call__(self, part, x_BLD, context):
    y_BLD, aux = part(x_BLD, context)
    x_BLD = x_BLD + (y_BLD * self.scale_D[...][None, None]).astype(x_BLD.dtype)
    if self.kind == "stateful":
      self.seen.set_value(self.seen.get_value() + 1)
    if self.kind == "anneals":
      self.scale_D.set_value(self.scale_D[...] * 0.9)
    wrong = {"alone": x_BLD, "wide": (x_BLD.astype(jnp.float32), aux), "no aux": (x_BLD, None)}
    return wrong.get(self.kind, (x_BLD, aux))


@pytest.mark.parametrize(
  ("kind", "message"),
  [
    ("stateful", "its variable seen changes in the forward pass, and is lost; use a balancer or a hook"),
    ("anneals", "its variable scale_D changes in the forward pass, and is lost; use a balancer or a hook"),
    ("alone", "returns a value of type Array; it must return a pair: x_BLD, and the aux of the part"),
    (
      "wide",
      "returns x_BLD of float32[2, 1024, 64] for x_BLD of bfloat16[2, 1024, 64]; it must have the same",
    ),
    ("no aux", "returns no aux; it must return that of the part, unchanged"),
  ],
)
def test_a_wrong_residual_is_named(kind, message):
  text = error_of(residual=functools.partial(residual, kind=kind), compute_dtype="bfloat16")
  assert text.startswith(f"--residual=residual:kind={kind}: residual residual: {message}")


class linear(own):
  """As anyone would write it first."""

  def __init__(self, dim, num_experts, num_experts_per_token, *, rngs):
    self.k = num_experts_per_token
    self.proj = nnx.Linear(dim, num_experts, use_bias=False, rngs=rngs)

  def __call__(self, x_GTD, context):
    return moe_jax.top_k(self.proj(x_GTD), self.k, context)


def test_a_parameter_without_axes_is_named():
  lacks = "has no logical axes; make it with moe_jax.matrix or moe_jax.vector"
  text = error_of(router=linear)
  assert text == f"--router=linear: router linear: parameter proj.kernel {lacks}"
  text = error_of(mixer=functools.partial(mixer, kind="linear"))
  assert text == f"--mixer=mixer:kind=linear: mixer mixer: parameter proj.bias {lacks}"


def test_wrong_axes_are_named():
  text = error_of(mixer=functools.partial(mixer, kind="axes"))
  assert "mixer mixer: parameter w_DD has 2 dimensions and 1 logical axes; name one for each" in text
  text = error_of(experts=functools.partial(network, axes=(None, "embed", "mlp")))
  assert "experts network: parameter w_up_EDF has the logical axes None, embed, mlp; the first" in text


def test_a_wrong_output_of_a_mixer_is_named():
  text = error_of(mixer=functools.partial(mixer, kind="alone"))
  assert "mixer mixer: returns a value of type Array; it must return a pair" in text
  text = error_of(mixer=functools.partial(mixer, kind="wide"), compute_dtype="bfloat16")
  assert "returns y_BLD of float32[2, 1024, 64] for x_BLD of bfloat16[2, 1024, 64]" in text


def test_right_parts_pass():
  for dtype in ("float32", "bfloat16"):
    resolve(
      ModelConfig(
        moe=MoEConfig(E, K, 8, router=own, experts=network),
        mixer=mixer,
        residual=residual,
        compute_dtype=dtype,
      )
    )
