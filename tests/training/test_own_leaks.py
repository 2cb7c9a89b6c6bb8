"""Parts of a user's that look at later tokens and do not say so are refused before anything is trained."""

import functools

import jax.numpy as jnp
import pytest
from flax import nnx

import moe_jax
from moe_jax import sharding
from moe_jax.errors import InputError
from moe_jax.nn.build import resolve
from moe_jax.nn.experts import EXPERTS
from moe_jax.nn.ffn import FFNS, SHARED_EXPERTS
from moe_jax.nn.mixers import MIXERS
from moe_jax.nn.routers import ROUTERS
from moe_jax.sharding.dispatchers import make_dispatcher
from moe_jax.training import own_leaks
from moe_jax.training.compiled import check_run
from tests import tiny

CONFIG = tiny.change(tiny.CONFIG, balancers="none", jitter=0.0)


class Own(moe_jax.Router):
  def __init__(self, dim, num_experts, num_experts_per_token, *, rngs):
    self.k = num_experts_per_token
    self.w_DE = moe_jax.matrix(rngs, (dim, num_experts), ("embed", "router"))

  def __call__(self, x_GTD, context):
    return moe_jax.top_k(moe_jax.project(x_GTD, self.w_DE[...]), self.k, context)


class Peeking(Own):
  """Meant to read the token before."""

  def __call__(self, x_GTD, context):
    return super().__call__(jnp.roll(x_GTD, -1, axis=1), context)


class Unit(Own):
  """Divides by the norms of its weights, as cosine routers do."""

  def __call__(self, x_GTD, context):
    w_DE = self.w_DE[...] / jnp.linalg.norm(self.w_DE[...], axis=0, keepdims=True)
    logits_GTE = moe_jax.project(x_GTD, w_DE)
    return moe_jax.top_k(self.seen(logits_GTE), self.k, context)

  def seen(self, logits_GTE):
    return logits_GTE


class Deviation(Unit):
  def seen(self, logits_GTE):
    return logits_GTE - logits_GTE.mean(axis=1, keepdims=True)


class FromTheStart(Deviation):
  """Divides what it starts with, too."""

  def __init__(self, dim, num_experts, num_experts_per_token, *, rngs):
    super().__init__(dim, num_experts, num_experts_per_token, rngs=rngs)
    self.w_DE.set_value(self.w_DE[...] / jnp.linalg.norm(self.w_DE[...], axis=0, keepdims=True))


class Calibrated(Own):
  """Subtracts the mean of the batch, in evaluation only."""

  def __call__(self, x_GTD, context):
    return super().__call__(x_GTD if context.train else x_GTD - x_GTD.mean(axis=1, keepdims=True), context)


class FarAhead(Own):
  """Reads the token 40 places behind."""

  def __call__(self, x_GTD, context):
    return super().__call__(jnp.roll(x_GTD, -40, axis=1), context)


class Declared(Peeking):
  leaks = "always"


class Centred(moe_jax.ExpertNetwork):
  """Subtracts the mean over all rows, which are those of other tokens, too."""

  def __init__(self, num_experts, dim, expert_dim, *, rngs):
    self.w_EDD = moe_jax.matrix(rngs, (num_experts, dim, dim), ("expert", "embed", "mlp"))

  def __call__(self, rows, product):
    return product(rows, self.w_EDD[...]) - jnp.mean(product(rows, self.w_EDD[...]), axis=-2, keepdims=True)


class Mean(nnx.Module):
  """A mixer: the mean of all tokens, or of those up to each."""

  def __init__(self, dim, *, whole: bool = False, rngs):
    self.w_DD = moe_jax.matrix(rngs, (dim, dim), ("embed", "mlp"))
    self.whole = whole

  def __call__(self, x_BLD, context):
    sum_BLD = jnp.cumsum(x_BLD, axis=1)
    mean = sum_BLD[:, -1:] if self.whole else sum_BLD / (1 + jnp.arange(x_BLD.shape[1]))[None, :, None]
    return jnp.broadcast_to(mean, x_BLD.shape) @ self.w_DD[...], None


class UnitMean(Mean):
  """Divides by the norms of its weights."""

  def __call__(self, x_BLD, context):
    y_BLD, _ = super().__call__(x_BLD, context)
    return y_BLD / jnp.linalg.norm(self.w_DD[...]), None


class UnitExperts(Centred):
  """Looks at no other token."""

  def __call__(self, rows, product):
    norm_EDD = jnp.linalg.norm(self.w_EDD[...], axis=1, keepdims=True)
    return product(rows, self.w_EDD[...] / norm_EDD)


class WholeShared(Mean):
  """As a network of shared experts."""

  def __init__(self, dim, *, rngs):
    super().__init__(dim, whole=True, rngs=rngs)

  def __call__(self, x_BLD, context=None):
    return super().__call__(x_BLD, context)


class Fails(Own):
  """Cannot be in a model as small as the one that it is measured on."""

  def __call__(self, x_GTD, context):
    if x_GTD.shape[-1] == 16 and x_GTD.shape[1] == 64:
      raise ValueError("too\nsmall")
    return super().__call__(x_GTD, context)


class Average(nnx.Module):
  """A residual that adds the mean of all tokens, or of none."""

  def __init__(self, dim, *, factor: float = 1.0):
    self.scale_D, self.factor = moe_jax.vector(jnp.ones(dim), ("norm",)), factor

  def __call__(self, part, x_BLD, context):
    y_BLD, aux = part(x_BLD * self.scale_D[...][None, None], context)
    return x_BLD + y_BLD + self.factor * x_BLD.mean(axis=1, keepdims=True), aux


def around(registry, name, inside):
  """The wrapper `name` of this package around a part of a user's."""
  return functools.partial(registry[name], **{registry.wraps: inside})


def check(**fields):
  return check_run(tiny.change(CONFIG, **fields), sharding.make_mesh(CONFIG.mesh))


@pytest.mark.parametrize(
  ("fields", "part"),
  [
    ({"router": Peeking}, r"--router=Peeking \(.*test_own_leaks.py:\d+\)"),
    (
      {"router": Peeking, "accept_leaks": "softmax_topk"},
      "(?=.*say --accept_leaks=Peeking).*--router=Peeking",
    ),
    ({"router": Deviation}, "--router=Deviation"),
    ({"router": FromTheStart}, "--router=FromTheStart"),
    ({"router": Calibrated}, "--router=Calibrated"),
    ({"router": FarAhead}, "--router=FarAhead"),
    ({"experts": Centred}, "--experts=Centred"),
    ({"mixer": lambda dim, rngs: Mean(dim, whole=True, rngs=rngs)}, "--mixer=<lambda>"),
    ({"mixer": lambda dim, rngs: UnitMean(dim, whole=True, rngs=rngs)}, "--mixer=<lambda>"),
    ({"residual": Average}, r"--residual=Average \(.*test_own_leaks.py:\d+\)"),
  ],
  ids=[
    "router",
    "accepted",
    "unit router",
    "unit from the start",
    "in evaluation",
    "far ahead",
    "experts",
    "mixer",
    "unit mixer",
    "residual",
  ],
)
def test_a_part_that_looks_at_later_tokens_is_refused(fields, part):
  with pytest.raises(InputError, match=rf"{part}.*: its output for a token depends on later tokens"):
    check(**fields)
  check(**fields, objective="masked_lm")


WHOLE = functools.partial(Mean, whole=True)
WRAPPED = {
  "merged_topk": {"router": around(ROUTERS, "merged_topk", Peeking)},
  "low_rank mixer": {"mixer": around(MIXERS, "low_rank", WHOLE)},
  "low_rank ffn": {"ffn": around(FFNS, "low_rank", WHOLE)},
  "low_rank shared": {
    "shared_experts": around(SHARED_EXPERTS, "low_rank", WholeShared),
    "num_shared_experts": 1,
  },
} | {
  name: {"experts": around(EXPERTS, name, Centred)}
  for name in ("expert_dropout", "low_rank", "quantised", "quantised_training", "fp8_products")
}


@pytest.mark.parametrize("name", WRAPPED)
def test_a_part_inside_of_another_that_looks_at_later_tokens_is_refused(name):
  flag = next(iter(WRAPPED[name]))
  part = rf"--{flag}=\w+:.*\(.*test_own_leaks.py:\d+\)"
  with pytest.raises(InputError, match=f"{part}: its output for a token depends on later tokens"):
    check(**WRAPPED[name])


def test_of_a_dispatcher_of_a_users_it_is_not_known(capsys):
  config = check(dispatcher=lambda: make_dispatcher("sorted"))
  assert "--dispatcher=<lambda> (" in (said := capsys.readouterr().err) and "is not checked" in said
  assert own_leaks.sees_later_tokens(config.model) is None
  assert own_leaks.sees_later_tokens(check(residual=functools.partial(Average, factor=0.0)).model) is False


@pytest.mark.parametrize("dispatcher", ["sorted", "dropless"])
def test_a_part_that_does_not_is_trained(dispatcher, capsys):
  check(router=Own, mixer=Mean, dispatcher=dispatcher, balancers="loss_free_bias:0.01", jitter=0.1)
  assert capsys.readouterr().err == ""


def test_parts_that_divide_by_norms_of_their_weights_are_measured(capsys):
  config = check(router=Unit, mixer=UnitMean, experts=UnitExperts, balancers="loss_free_bias:0.01")
  assert capsys.readouterr().err == ""
  assert own_leaks.sees_later_tokens(config.model) is False


class FailsToo(Fails):
  pass


class NotFinite(Mean):
  """Its outputs are no numbers in the small model that it is measured on."""

  def __call__(self, x_BLD, context):
    y_BLD, _ = super().__call__(x_BLD, context)
    return y_BLD * (jnp.nan if x_BLD.shape[:2] == (4, 64) else 1.0), None


@pytest.mark.parametrize(
  ("fields", "why"),
  [({"router": FailsToo}, "too small"), ({"mixer": NotFinite}, "logits are not finite")],
)
def test_of_a_part_that_cannot_be_measured_it_is_not_known(fields, why, capsys):
  config = check(**fields)
  assert "is not checked" in (said := capsys.readouterr().err) and why in said
  assert own_leaks.sees_later_tokens(config.model) is None
  assert own_leaks.sees_later_tokens(check(**fields, objective="masked_lm").model) is False


class Wide(Own):
  """Takes no batch as small as that of the trial."""

  def __call__(self, x_GTD, context):
    if x_GTD.shape[-1] == 8:
      raise ValueError("too\nnarrow")
    return super().__call__(x_GTD, context)


def test_a_part_that_was_not_tried_is_named_once(capsys):
  for _ in range(2):
    check(router=Wide)
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("note: --router=Wide (") and line.endswith(
    "not tried before the run: a tiny batch fails (ValueError: too narrow)"
  )


def test_a_part_that_declares_it_is_not_measured():
  with pytest.raises(InputError, match="say --accept_leaks=Declared"):
    check(router=Declared)


def test_a_part_that_cannot_be_measured_is_said_to_be_unchecked_once(capsys):
  for _ in range(2):
    check(router=Fails)
  (line,) = capsys.readouterr().err.splitlines()
  assert (
    line.startswith("note: --router=Fails") and "is not checked" in line and "ValueError: too small" in line
  )


def test_without_a_cpu_backend_a_part_is_not_checked_and_said_so(monkeypatch, capsys):
  """As with JAX_PLATFORMS=cuda."""

  class Unseen(Own):
    pass

  def no_cpu(backend=None):
    raise RuntimeError("Unknown backend cpu")

  monkeypatch.setattr(own_leaks.jax, "local_devices", no_cpu)
  own_leaks.check_own_leaks(resolve(tiny.change(CONFIG, router=Unseen).model))
  assert "whether it looks at later tokens is not checked" in capsys.readouterr().err
