"""Multi-token prediction: what each module sees and predicts, its loss, its gradients, and its balancers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.config import MoEConfig
from moe_jax.errors import InputError
from moe_jax.nn import Context
from moe_jax.nn.aux import moe_auxes
from moe_jax.nn.mtp import ahead
from moe_jax.nn.transformer import Transformer
from moe_jax.nn.variables import abstract
from moe_jax.training.compiled import resolve_config
from moe_jax.training.objectives import NextToken, NextTokens
from tests import tiny
from tests.nn.layer import randomized

V, L, K, RATE = tiny.VOCAB, 16, 2, 0.01
CONFIG = tiny.change(
  tiny.CONFIG,
  mtp_depth=2,
  objective="next_tokens:weight=0.6",
  num_layers=1,
  balancers=f"switch_loss:0.05,loss_free_bias:{RATE}",
  dispatcher="dropless",
  jitter=0.0,
)
BATCH = tiny.make_batch()  # of its sequences, one has 8 tokens and one 13
MASK_BL = BATCH["mask_BL"]


def model_of(**fields) -> Transformer:
  config = dataclasses.replace(resolve_config(CONFIG).model, **fields)
  return Transformer(config, V, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def predict():
  """(tokens, next tokens, mask) -> logits of the next token and of both modules, and the aux."""
  model = randomized(model_of)
  graphdef, state = nnx.split(model)

  @jax.jit
  def run(tokens_BL, next_BL, mask_BL):
    return nnx.merge(graphdef, state).predict_ahead(tokens_BL, next_BL, Context(mask_BL))

  return lambda *args: jax.device_get(run(*args))


def test_ahead_by_hand():
  x_BL = np.array([[1, 2, 3], [4, 5, 6]])
  np.testing.assert_array_equal(ahead(x_BL, 0), x_BL)
  np.testing.assert_array_equal(ahead(x_BL, 1), [[2, 3, 0], [5, 6, 0]])
  np.testing.assert_array_equal(ahead(x_BL, 2), [[3, 0, 0], [6, 0, 0]])
  np.testing.assert_array_equal(ahead(x_BL, 7), np.zeros((2, 3)))


class Given:
  """A model with these logits, whatever it is given."""

  def __init__(self, logits):
    self.logits = logits

  def predict_ahead(self, tokens_BL, next_BL, context):
    return self.logits, ((), *[()] * (len(self.logits) - 1))


@pytest.mark.parametrize("depth", [1, 3])
def test_the_loss_is_the_loop_over_targets_that_exist(depth, rng):
  """Module k predicts at position i the token i + k + 1 of the sequence: target i + k, if that is no padding."""
  logits = tuple(rng.standard_normal((depth + 1, 8, L, V)).astype(np.float32))
  expected = 0.0
  for k in range(depth + 1):
    for b, i in np.ndindex(8, L):
      if i + k < L and MASK_BL[b, i + k]:
        x_V = logits[k][b, i].astype(np.float64)
        nll = np.log(np.exp(x_V).sum()) - x_V[BATCH["targets_BL"][b, i + k]]
        expected += nll if k == 0 else 0.6 / depth * nll
  objective = NextTokens(weight=0.6)
  batch = {name: jnp.asarray(x) for name, x in BATCH.items()}
  np.testing.assert_allclose(objective(Given(logits), batch, Context()).loss, expected, rtol=1e-5)
  assert objective.num_targets(batch) == MASK_BL.sum()


def test_a_module_sees_the_token_it_embeds_and_none_behind_it(predict):
  """A change of token j shows in the logits of module k at position i if and only if j <= i + k."""
  window = np.concatenate([BATCH["tokens_BL"], BATCH["targets_BL"][:, -1:]], axis=1)
  everything = np.ones_like(MASK_BL)
  before, _ = predict(window[:, :-1], window[:, 1:], everything)
  changed_at = 9
  window[:, changed_at] = (window[:, changed_at] + 1) % V
  after, _ = predict(window[:, :-1], window[:, 1:], everything)
  for k in range(3):
    moved_L = np.abs(after[k] - before[k]).max(axis=(0, 2)) > 1e-6
    exists = L - k  # behind that, the module has no token to embed
    np.testing.assert_array_equal(moved_L[:exists], np.arange(exists) + k >= changed_at, err_msg=str(k))


def test_padding_changes_nothing_and_is_not_routed(predict):
  logits, aux = predict(BATCH["tokens_BL"], BATCH["targets_BL"], MASK_BL)
  other = {name: np.where(MASK_BL, BATCH[name], 7) for name in ("tokens_BL", "targets_BL")}
  again, _ = predict(other["tokens_BL"], other["targets_BL"], MASK_BL)
  for k, (a, b) in enumerate(zip(logits, again, strict=True)):
    mask_BL = np.asarray(ahead(MASK_BL, k))
    np.testing.assert_allclose(a[mask_BL], b[mask_BL], atol=1e-5)
    (layer,) = moe_auxes(aux[k])
    assert layer.tokens_per_expert_BE.sum() == K * mask_BL.sum()


def test_a_module_whose_block_adds_nothing_is_its_formula():
  """norm(W [norm(h); norm(Emb(t))]), with the norms of the module, then the model's output matrix."""
  model = randomized(lambda: model_of(mtp_depth=1, residual="pre_norm"))
  (successor,) = model.successors
  (block,) = successor.stack.pattern.blocks
  for w in (block.mixer.w_out_NHD, block.ffn.experts.w_down_EFD):
    w.set_value(jnp.zeros_like(w[...]))
  head_DV = np.asarray(model.w_head_DV[...], np.float64)
  model.w_head_DV.set_value(jnp.eye(16, V))  # so that the model's logits are what it has behind its last norm
  run = jax.jit(lambda model: model.predict_ahead(BATCH["tokens_BL"], BATCH["targets_BL"])[0])
  hidden, _ = run(model)
  model.w_head_DV.set_value(jnp.asarray(head_DV, jnp.float32))
  _, found = run(model)

  def norm(x, scale_D):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * np.asarray(scale_D[...], np.float64)

  embedded = np.asarray(model.embedding_VD[...], np.float64)[BATCH["targets_BL"]]
  both = (
    norm(np.asarray(hidden, np.float64)[..., :16], successor.hidden_norm.scale_D),
    norm(embedded, successor.embedding_norm.scale_D),
  )
  w_2DX = np.asarray(successor.w_join_2DX[...], np.float64)
  joined = np.concatenate(both, axis=-1) @ w_2DX.reshape(32, 16)
  expected = norm(joined, successor.final_norm.scale_D) @ head_DV
  np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)


def test_with_weight_0_the_gradients_are_those_without_modules():
  """Balancing losses included. With another weight, the modules reach the whole model."""
  batch = {name: jnp.asarray(x) for name, x in BATCH.items()}
  with_modules = randomized(model_of)

  def gradients(objective, **fields):
    graphdef, params, rest = nnx.split(randomized(lambda: model_of(**fields)), nnx.Param, ...)
    drawn = dict(nnx.to_flat_state(nnx.state(with_modules, nnx.Param)))
    params = nnx.from_flat_state([(path, drawn[path]) for path, _ in nnx.to_flat_state(params)])

    @jax.grad
    def of(params):
      terms = objective(nnx.merge(graphdef, params, rest), batch, Context(batch["mask_BL"], train=True))
      return terms.loss + sum(jnp.sum(layer.loss) for layer in moe_auxes(terms.aux))

    found = nnx.to_flat_state(jax.device_get(jax.jit(of)(params)))
    return {path: value.get_value() for path, value in found}

  none, some = gradients(NextTokens(weight=0.0)), gradients(NextTokens(weight=0.6))
  without = gradients(NextToken(), mtp_depth=0)
  assert {path for path in none if path[0] != "successors"} == set(without)
  for path, expected in without.items():
    scale = np.abs(expected).max()
    np.testing.assert_allclose(none[path], expected, rtol=1e-4, atol=1e-5 * scale, err_msg=str(path))
    assert np.abs(some[path] - expected).max() > 1e-3 * scale, path
  assert all((np.abs(g).max() > 0) == (path[0] != "successors") for path, g in none.items())


def test_balancers_of_modules_are_updated_by_their_own_counts():
  mesh, steps = tiny._steps(CONFIG)
  with jax.set_mesh(mesh):
    state = steps.init(0)
    before = jax.device_get(state)
    state, _ = steps.train(state, BATCH)
  graphdef = nnx.graphdef(steps.model)
  model = nnx.merge(graphdef, before.params, before.variables)
  look = lambda model: model.predict_ahead(BATCH["tokens_BL"], BATCH["targets_BL"], Context(MASK_BL))[1]
  aux = jax.device_get(jax.jit(look)(model))
  biases = [x for x in jax.tree.leaves(state.variables) if x.shape == (1, 8)]
  assert len(biases) == 3
  # `variables` are in the order of the layers, as aux is
  for layer, bias in zip(moe_auxes(aux), biases, strict=True):
    counts_E = layer.tokens_per_expert_BE.sum(axis=(0, 1))
    np.testing.assert_allclose(bias[0], RATE * np.sign(counts_E.mean() - counts_E), rtol=1e-6)


def test_a_step_is_the_same_in_micro_batches():
  """With a loss over the whole step, whose counts of each module go through the context."""
  whole, cut = (tiny.one_step(tiny.change(CONFIG, accumulation=n), BATCH) for n in (1, 4))
  tiny.assert_same(cut, whole)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"objective": "next_token"}, "--mtp_depth=2: --objective=next_token does not train these modules"),
    ({"mtp_depth": 0}, "--objective=next_tokens:0.6: the model predicts one token; use --mtp_depth=1"),
    ({"mtp_depth": -1}, "--mtp_depth=-1: modules behind the stack, or 0"),
    ({"objective": "next_tokens:weight=-1"}, "objective next_tokens: weight must be 0 or more, got -1"),
  ],
)
def test_wrong_settings_are_one_line_errors(fields, message):
  with pytest.raises(InputError) as error:
    resolve_config(tiny.change(CONFIG, **fields))
  assert message in str(error.value) and "\n" not in str(error.value)


def test_modules_follow_the_last_block():
  """Here the last of a dense and a sparse layer."""
  moe = MoEConfig(num_experts=4)
  model = abstract(lambda: model_of(num_layers=2, num_dense_first=1, mtp_depth=1, moe=moe))
  assert hasattr(model.successors[0].stack.pattern.blocks[0].ffn, "experts")
  assert model.successors[0].stack.first_layer == 2
