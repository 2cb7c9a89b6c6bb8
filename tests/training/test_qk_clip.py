"""QK-clip: the largest scores against loops, what a factor does to a mixer, and the limit after a step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.config import BlockConfig, ModelConfig, Segment
from moe_jax.errors import InputError
from moe_jax.nn import Context, Transformer
from moe_jax.nn.aux import added, mixer_auxes, nothing
from moe_jax.nn.mixers import MIXERS
from moe_jax.ops.largest_scores import largest_scores
from moe_jax.training.compiled import resolve_config
from moe_jax.training.hooks import QKClip
from moe_jax.types import Maximum
from tests import tiny
from tests.nn.layer import randomized

L, D, N, H = 9, 12, 4, 8
MASK_BL = np.arange(L) < np.array([[L], [6]])
OFFERED = {"dim": D, "num_heads": N, "num_kv_heads": 2, "head_dim": H, "num_layers": 3, "init_scale": 1.0}
MLA = "mla:query_rank=5:kv_rank=7:nope_dim=6:rope_dim=4:value_dim=3"
MIXER_SPECS = [
  ("attention:qkv_bias=true:window=4:sinks=true", {}),
  ("attention:yarn_factor=4:yarn_length=4:rotary_fraction=0.5", {"num_kv_heads": N}),
  (MLA, {}),
  ("mla:kv_rank=7:yarn_factor=4:yarn_length=4:yarn_mscale_all_dim=1", {}),
]


@pytest.mark.parametrize("block", [L, 4])
@pytest.mark.parametrize(
  "form", [{}, {"window": 3}, {"causal": False}, {"causal": False, "window": 3}, {"scale": 0.3}]
)
def test_the_largest_scores_are_those_of_a_loop(rng, form, block):
  query, key = (rng.normal(size=(2, L, n, H)).astype(np.float32) for n in (N, 2))
  key[1, 7:] *= 100  # padding
  expected = np.full(N, -np.inf)
  for b, i, j, n in np.ndindex(2, L, L, N):
    sees = (j <= i or not form.get("causal", True)) and abs(i - j) < form.get("window", L)
    if sees and MASK_BL[b, i] and MASK_BL[b, j]:
      score = form.get("scale", H**-0.5) * (query[b, i, n].astype(float) @ key[b, j, n // 2])
      expected[n] = max(expected[n], score)
  found = largest_scores(jnp.asarray(query), jnp.asarray(key), jnp.asarray(MASK_BL), block=block, **form)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def largest(mixer, x_BLD):
  _, aux = mixer(x_BLD, Context(MASK_BL, record_scores=True))
  return np.asarray(aux.largest_score_N.value)


@pytest.mark.parametrize("spec, changed", MIXER_SPECS)
def test_a_factor_of_a_head_multiplies_its_scores_and_no_others(rng, spec, changed):
  """In any text, so in two of them; and outputs without the record are as before."""
  method = MIXERS.resolve(spec)
  mixer = randomized(lambda: method(**OFFERED | changed, rngs=nnx.Rngs(0)))
  x_BLD, other_BLD = (jnp.asarray(rng.normal(size=(2, L, D)), jnp.float32) for _ in range(2))
  y_BLD, aux = mixer(x_BLD, Context(MASK_BL))
  assert aux is None
  np.testing.assert_array_equal(mixer(x_BLD, Context(MASK_BL, record_scores=True))[0], y_BLD)
  before = largest(mixer, x_BLD), largest(mixer, other_BLD)
  factor_N = np.array([1.0, 0.25, 0.7, 0.01], np.float32)
  mixer.scale_scores(jnp.asarray(factor_N))
  for x, old in zip((x_BLD, other_BLD), before, strict=True):
    np.testing.assert_allclose(largest(mixer, x), factor_N * old, rtol=1e-4)


def test_factors_are_shared_as_the_paper_says():
  """Plain attention: the square root for both. Latent: also, the factor for rotated queries, and 1 for their key."""
  factor_N = np.array([1.0, 0.25, 0.7, 0.01], np.float32)
  build = lambda spec: randomized(
    lambda: MIXERS.resolve(spec)(**OFFERED | {"num_kv_heads": N}, rngs=nnx.Rngs(0))
  )
  ratio = {}
  for spec in ("attention", MLA):
    old, new = build(spec), build(spec)
    new.scale_scores(jnp.asarray(factor_N))
    for path, w in nnx.to_flat_state(nnx.state(new, nnx.Param)):
      before = np.asarray(dict(nnx.to_flat_state(nnx.state(old, nnx.Param)))[path].get_value())
      ratio[spec, path[0]] = np.asarray(w.get_value()) / before
  root_1N1, factor_1N1 = np.sqrt(factor_N)[None, :, None], factor_N[None, :, None]
  for name in ("w_query_DNH", "w_key_DNH"):
    np.testing.assert_allclose(ratio["attention", name], np.broadcast_to(root_1N1, (D, N, H)), rtol=1e-5)
  query = ratio[MLA, "w_query_up_XNH"]
  np.testing.assert_allclose(query[..., :6], np.broadcast_to(root_1N1, (5, N, 6)), rtol=1e-5)
  np.testing.assert_allclose(query[..., 6:], np.broadcast_to(factor_1N1, (5, N, 4)), rtol=1e-5)
  np.testing.assert_allclose(ratio[MLA, "w_key_up_XNH"], np.broadcast_to(root_1N1, (7, N, 6)), rtol=1e-5)
  touched = {key for key, value in ratio.items() if np.any(value != 1)}
  expected = {("attention", "w_query_DNH"), ("attention", "w_key_DNH")}
  assert touched == expected | {(MLA, "w_query_up_XNH"), (MLA, "w_key_up_XNH")}


def test_every_mixer_gets_the_factors_of_its_own_scores():
  """In a scanned pattern of three mixers, one of which has no scores, with a module behind the stack."""
  blocks = tuple(BlockConfig(mixer, ffn="mlp") for mixer in ("attention", "lightning", MLA))
  config = ModelConfig(
    segments=(Segment(blocks, 2),), model_dim=D, num_heads=N, head_dim=H, dense_dim=8, mtp_depth=1
  )
  model = randomized(lambda: Transformer(config, 20, rngs=nnx.Rngs(0)))
  tokens_BL = np.random.default_rng(0).integers(0, 20, (2, L))
  record = Context(MASK_BL, record_scores=True)
  _, aux = model.predict_ahead(tokens_BL, tokens_BL, record)
  scores = [np.asarray(one.largest_score_N.value) for one in mixer_auxes(aux)]
  assert [s.shape for s in scores] == [(2, N), (2, N), (1, N)]
  tau = float(np.median(np.concatenate(scores)))
  hook, old = QKClip(tau), nnx.clone(model)
  assert tau > 0 and hook(model, hook.init(model), aux) == ()
  mixers = lambda model: [m for _, m in nnx.iter_modules(model) if hasattr(m, "scale_scores")]
  for before, after, s in zip(mixers(old), mixers(model), scores, strict=True):
    w_key = "w_key_DNH" if hasattr(before, "w_key_DNH") else "w_key_up_XNH"
    ratio = np.asarray(getattr(after, w_key)[...] / getattr(before, w_key)[...])[:, 0, :, 0]
    gamma = np.where(s > tau, tau / s, 1.0)
    if w_key == "w_key_DNH":  # two query heads share a key head
      gamma = gamma.reshape(2, 2, 2).min(axis=-1)
    np.testing.assert_allclose(ratio, np.sqrt(gamma), rtol=1e-5)


@pytest.mark.parametrize("mixer", ["attention", "mla:kv_rank=6:query_rank=6"])
def test_after_a_step_the_largest_score_of_its_batch_is_at_most_tau(mixer):
  """With a learning rate near 0, so that only the clip moves parameters, and in micro-batches, whose maxima combine."""
  tau = 0.02
  config = tiny.change(
    tiny.CONFIG, num_layers=1, mixer=mixer, num_kv_heads=2, hooks=f"qk_clip:{tau}", accumulation=2,
    learning_rate=1e-12, weight_decay=0.0, balancers="none", jitter=0.0,
  )  # fmt: skip
  mesh, steps = tiny._steps(config)
  batch = tiny.make_batch()
  graphdef = nnx.graphdef(steps.model)

  @jax.jit
  def scores(params, variables):
    context = Context(batch["mask_BL"], record_scores=True)
    _, aux = nnx.merge(graphdef, params, variables)(batch["tokens_BL"], context)
    return mixer_auxes(aux)[0].largest_score_N.value

  with jax.set_mesh(mesh):
    state = steps.init(0)
    before = np.asarray(scores(state.params, state.variables))
    state, metrics = steps.train(state, batch)
    after = np.asarray(scores(state.params, state.variables))
  assert before.max() > 2 * tau
  np.testing.assert_allclose(metrics["attention_score"], before.max(), rtol=1e-5)
  np.testing.assert_allclose(after, np.where(before > tau, tau, before), rtol=1e-4)
  assert after.max() <= tau * (1 + 1e-5)


def test_micro_batches_combine_by_sum_or_maximum():
  one = {"sum": jnp.array([1.0, -2.0]), "max": Maximum(jnp.array([-3.0, 5.0]))}
  other = {"sum": jnp.array([4.0, 1.0]), "max": Maximum(jnp.array([-1.0, 2.0]))}
  both = added(added(nothing(jax.eval_shape(lambda: one)), one), other)
  np.testing.assert_array_equal(both["sum"], [5.0, -1.0])
  np.testing.assert_array_equal(both["max"].value, [-1.0, 5.0])


def test_wrong_settings_are_one_line_errors():
  with pytest.raises(InputError, match=r"--hooks=qk_clip:0.*tau must be above 0, got 0"):
    resolve_config(tiny.change(tiny.CONFIG, hooks="qk_clip:0"))
  for fields, message in (
    ({"qk_norm": True}, "a mixer normalises or clips queries and keys"),
    ({"mixer": "attention:clip_qkv=3"}, "a mixer normalises or clips queries and keys"),
    ({"mixer": "lightning"}, "no mixer of the model has attention scores"),
    (
      {"mixer": "low_rank:mixer=attention"},
      "scales queries and keys of every mixer, and one has frozen parameters",
    ),
    ({"trained": "router"}, "scales queries and keys of every mixer, and one has frozen parameters"),
  ):
    with pytest.raises(InputError, match=f"hook qk_clip: {message}"):
      tiny._steps(tiny.change(tiny.CONFIG, hooks="qk_clip", **fields))
