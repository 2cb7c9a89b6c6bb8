"""A step as a whole: its gradient, its randomness, frozen parts, and what is compiled anew."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from moe_jax.comparison import comparison
from moe_jax.data import load_dataset
from moe_jax.nn.context import Context
from moe_jax.nn.moe import MoE
from moe_jax.nn.routers import ROUTERS
from moe_jax.nn.transformer import Transformer
from moe_jax.nn.variables import freeze
from moe_jax.ops.balancing import BALANCERS, Balancer
from moe_jax.training.objectives import NextToken
from moe_jax.training.optim import make_optimizer
from moe_jax.training.step import Options, init_state, make_step, prepared
from tests import tiny

DRAWING = tiny.change(
  tiny.CONFIG, router="gshard_top2", accept_leaks="gshard_top2", jitter=0.2, balancers="switch_loss:0.1"
)


def test_the_gradient_is_that_of_the_reported_total():
  """Of a total that is put together here: the mean over real targets plus every loss of every layer."""
  config = tiny.change(tiny.CONFIG, jitter=0.0, balancers="switch_loss:0.5,z_loss:0.3,loss_free_bias:0.01")
  mesh, steps = tiny._steps(config)
  graphdef, batch = nnx.graphdef(steps.model), tiny.make_batch()

  def total(params, variables):
    model = nnx.merge(graphdef, params, variables)
    logits_BLV, aux = model(batch["tokens_BL"], Context(batch["mask_BL"], train=True))
    log_probs_BLV = jax.nn.log_softmax(logits_BLV)
    targets_BL = jnp.take_along_axis(log_probs_BLV, batch["targets_BL"][..., None], axis=-1)[..., 0]
    losses = aux[0][0].ffn.losses
    task = -jnp.sum(targets_BL * batch["mask_BL"]) / batch["mask_BL"].sum()
    return task + losses["switch_loss"].sum() + losses["z_loss"].sum()

  with jax.set_mesh(mesh):
    state = steps.init(0)
    expected, gradients = jax.jit(jax.value_and_grad(total))(state.params, state.variables)
    _, metrics = steps.train(state, batch)
  np.testing.assert_allclose(metrics["total_loss"], expected, rtol=1e-6)
  for (path, found), g in zip(
    jax.tree.leaves_with_path(metrics["gradients"]), jax.tree.leaves(gradients), strict=True
  ):
    np.testing.assert_allclose(found, g, rtol=1e-4, atol=1e-5 * np.abs(g).max(), err_msg=str(path))


@pytest.fixture(scope="module")
def drawing():
  mesh, steps = tiny._steps(DRAWING)
  with jax.set_mesh(mesh):
    yield steps


def _loss(steps, state) -> float:
  return float(steps.train(jax.tree.map(jnp.copy, state), tiny.make_batch())[1]["loss"])


def test_draws_follow_from_the_seed_and_the_step(drawing):
  one, two = drawing.init(0), drawing.init(1)
  assert np.any(one.key != two.key)
  losses = [_loss(drawing, s) for s in (one, one, one._replace(key=two.key), one._replace(step=jnp.int32(1)))]
  assert losses[0] == losses[1] and len(set(losses)) == 3


def test_every_sequence_of_every_step_draws_by_itself(drawing):
  states = [drawing.init(0)._replace(step=jnp.int32(step)) for step in range(3)]
  batches = [prepared(state, tiny.make_batch(), NextToken(), tiny.VOCAB) for state in states]
  assert len(np.unique(np.concatenate([batch["key_B"] for batch in batches]), axis=0)) == 3 * 8
  assert len(np.unique(np.concatenate([batch["step_key_B"] for batch in batches]), axis=0)) == 3


def test_nothing_draws_in_evaluation(drawing):
  state, batch = drawing.init(0), tiny.make_batch()
  other = state._replace(key=drawing.init(1).key, step=jnp.int32(5))
  jax.tree.map(np.testing.assert_array_equal, drawing.evaluate(state, batch), drawing.evaluate(other, batch))
  batch["key_B"] = batch["tokens_BL"][:, :2].astype(np.uint32)  # whatever keys are given
  batch["step_key_B"] = batch["key_B"] + 1
  assert drawing.evaluate(state, batch).nll == drawing.evaluate(other, tiny.make_batch()).nll


@pytest.mark.parametrize(
  "router", ["noisy_topk", "gshard_top2", "hierarchical_topk", "vmoe_topk", "softmax_topk"]
)
def test_a_layer_draws_only_in_training(router):
  assert router in ROUTERS
  layer = MoE(
    8, num_experts=4, expert_dim=8, num_experts_per_token=2, router=router, jitter=0.3, rngs=nnx.Rngs(0)
  )
  x_BLD = jax.random.normal(jax.random.key(0), (4, 8, 8))

  @functools.partial(jax.jit, static_argnums=1)
  def forward(seed, train):
    key = jax.random.key(seed)
    return layer(x_BLD, Context(key_B=jax.random.split(key, 4), step_key=key, train=train))[0]

  np.testing.assert_array_equal(forward(0, False), forward(1, False))
  assert np.any(forward(0, True) != forward(1, True))


class NotedRun:
  """Stands for `Run`; trains nothing and keeps the configuration that it got, by arm and seed."""

  configs: ClassVar = {}

  def __init__(self, config, dataset, folder, progress, *, label, show, starts):
    assert starts == {}  # no run is finished
    self.folder = folder
    self.configs[label, config.train.seed] = config

  def train(self):
    self.folder.mkdir(parents=True, exist_ok=True)
    (self.folder / "result.json").write_text("{}")


def test_seeds_differ_and_arms_of_a_seed_share_parameters_and_batches(tmp_path, monkeypatch):
  monkeypatch.setattr(comparison, "Run", NotedRun)
  other = {"balancers": "loss_free_bias:0.01", "dispatcher": "dropless", "jitter": 0.0}
  arms, data = {"none": {"balancers": "none"}, "other": other}, load_dataset(tiny.CONFIG.data)
  comparison.Comparison(arms, (0, 1), tiny.CONFIG, tmp_path).run()
  starts = {}
  for run, config in NotedRun.configs.items():
    mesh, steps = tiny._steps(config)
    with jax.set_mesh(mesh):
      params = jax.tree.leaves(jax.device_get(steps.init(config.train.seed).params))
    starts[run] = params, next(data.train_batches(data_seed=config.data.data_seed))["tokens_BL"]
  for seed in (0, 1):
    jax.tree.map(np.testing.assert_array_equal, starts["none", seed], starts["other", seed])
  (one, tokens_one), (two, tokens_two) = (starts["none", seed] for seed in (0, 1))
  drawn = [(a, b) for a, b in zip(one, two, strict=True) if np.std(a) > 0]
  assert len(drawn) == 10 and all(np.mean(a == b) < 0.01 for a, b in drawn)
  assert np.mean(tokens_one == tokens_two) < 0.5


def test_a_router_that_needs_dropless_starts_without_accepting_leaks():
  config = tiny.change(DRAWING, dispatcher="dropless", accept_leaks="")
  mesh, steps = tiny._steps(config)
  with jax.set_mesh(mesh):
    assert steps.init(0).params["embedding_VD"].shape == (tiny.VOCAB, 16)


def test_a_mixer_that_is_causal_only_trains():
  """With a module of multi-token prediction, whose mixer is behind the last layer."""
  plain = {"num_layers": 1, "balancers": "none", "jitter": 0.0, "mtp_depth": 1, "objective": "next_tokens"}
  step = tiny.one_step(tiny.change(tiny.CONFIG, mixer="lightning:chunk=4", **plain), tiny.make_batch())
  assert np.isfinite(step["metrics"]["total_loss"])
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(step["gradients"]))


def test_frozen_layers_stay_in_a_step_of_ones_own():
  """`make_step` from parts: the embedding, norms and balancers still move."""
  moe = dataclasses.replace(tiny.CONFIG.model.moe, jitter=0.0)
  model = Transformer(dataclasses.replace(tiny.CONFIG.model, moe=moe), tiny.VOCAB, rngs=nnx.Rngs(0))
  freeze(model.segments)
  optimizer = make_optimizer(tiny.CONFIG.optimizer, 4)
  step = jax.jit(make_step(model, NextToken(), optimizer, options=Options(num_domains=2, gradients=True)))
  before = init_state(model, optimizer, (), seed=0)
  after, metrics = step(before, tiny.make_batch())
  moved = jax.tree.map(lambda a, b: bool(np.all(a != b)), after.params, before.params)
  assert not any(jax.tree.leaves(moved["segments"]))
  assert jax.tree.leaves((moved["w_head_DV"], moved["final_norm"])) == [True, True]
  assert any(np.any(x != 0) for x in jax.tree.leaves(after.variables))
  gradients = metrics["gradients"]
  assert not any(np.any(g) for g in jax.tree.leaves(gradients["segments"]))
  free = [gradients[name] for name in ("embedding_VD", "w_head_DV", "final_norm")]
  np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(free), rtol=1e-6)
  assert sum(x.size for x in jax.tree.leaves(after.opt_state)) < 3 * sum(
    x.size for x in jax.tree.leaves(free)
  )


def _pushes(amount: float):
  """A balancer factory, defined anew with every call."""

  def pushes_first_expert() -> Balancer:
    return Balancer(
      init=lambda num_experts: jnp.zeros(num_experts),
      bias=lambda bias_E: bias_E,
      update=lambda bias_E, unused_stats: bias_E.at[0].add(amount),
    )

  return pushes_first_expert


def test_a_method_that_is_defined_anew_is_compiled_anew(monkeypatch):
  monkeypatch.setattr(BALANCERS, "_factories", dict(BALANCERS))
  biases, compiled = [], []
  for amount in (0.25, 0.5):
    factory = _pushes(amount)
    BALANCERS.register("pushes", factory)
    config = tiny.change(tiny.CONFIG, balancers="pushes", num_layers=1)
    mesh, steps = _compile(config)
    assert _compile(config)[1] is steps  # the same object is found again, by its name or as it is
    assert _compile(tiny.change(config, balancers=factory))[1] is steps
    with jax.set_mesh(mesh):
      state, _ = steps.train(steps.init(0), tiny.make_batch())
    compiled.append(steps)
    biases.append(float(jax.tree.leaves(state.variables)[0].max()))
  assert compiled[0] is not compiled[1]
  assert biases == [0.25, 0.5]


def _compile(config):
  return tiny._steps.__wrapped__(config)  # without the cache of the tests, which goes by names
