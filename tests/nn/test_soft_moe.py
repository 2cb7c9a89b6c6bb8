"""Soft MoE (2308.00951) compared with a loop over slots, and the properties of soft assignment."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.errors import InputError
from moe_jax.nn import Context
from moe_jax.nn.build import resolve
from moe_jax.nn.ffn import MLP, SoftMoE
from moe_jax.nn.leaks import check_causal
from tests import tiny
from tests.nn.layer import float64, randomized
from tests.reference.routing import assert_gradients

B, L, D, E, C, F = 3, 5, 4, 3, 2, 6
MASK_BL = np.ones((B, L), bool)
MASK_BL[1, 3:] = False
MASK_BL[2] = False  # an empty sequence
NAMES = ("w_slots_DEC", "scale", "w_gate_EDF", "w_up_EDF", "w_down_EFD")


def make(**fields):
  """A layer with random weights, and a scale that sharpens the softmaxes."""
  moe = randomized(lambda: SoftMoE(D, E, F, slots=C, rngs=nnx.Rngs(0), **fields), seed=1, scale=1.0)
  moe.scale.set_value(jnp.float32(4.0))
  return moe


def parameters(moe):
  found = {name: getattr(moe if name in NAMES[:2] else moe.experts, name, None) for name in NAMES}
  return {name: v for name, v in found.items() if v is not None}


def weights_of(moe):
  return {name: float64(v) for name, v in parameters(moe).items()}


def inputs(seed=1):
  return np.random.default_rng(seed).normal(size=(B, L, D)).astype(np.float32)


def softmax(logits):
  exps = [math.exp(x) for x in logits]
  return [x / sum(exps) for x in exps]


def unit(vector):
  return vector / math.sqrt(sum(x * x for x in vector) + 1e-6)


def expert(w, e, x):
  up = x @ w["w_up_EDF"][e]
  if "w_gate_EDF" not in w:
    return np.maximum(up, 0) @ w["w_down_EFD"][e]
  gate = x @ w["w_gate_EDF"][e]
  return (gate / (1 + np.exp(-gate)) * up) @ w["w_down_EFD"][e]


def loop(w, x_BLD, mask_BL):
  """y_BLD and the combine weights summed over an expert's slots, [B, L, E]."""
  y_BLD, used_BLE = np.zeros(x_BLD.shape), np.zeros((*x_BLD.shape[:2], E))
  slots = [(e, c) for e in range(E) for c in range(C)]
  for b in range(B):
    tokens = [t for t in range(L) if mask_BL[b, t]]
    logit = {
      (t, e, c): w["scale"] * np.dot(unit(x_BLD[b, t]), unit(w["w_slots_DEC"][:, e, c]))
      for t in tokens
      for e, c in slots
    }
    outputs = []
    for e, c in slots if tokens else []:
      dispatch = softmax([logit[t, e, c] for t in tokens])
      outputs.append(expert(w, e, sum(d * x_BLD[b, t] for d, t in zip(dispatch, tokens))))
    for t in tokens:
      combine = softmax([logit[t, e, c] for e, c in slots])
      for (e, _), share, output in zip(slots, combine, outputs):
        y_BLD[b, t] += share * output
        used_BLE[b, t, e] += share
  return y_BLD, used_BLE


@functools.partial(jax.jit, static_argnames="graphdef")
def run(graphdef, state, x_BLD, mask_BL, cotangent_BLD):
  """The gradients with respect to weights and input, the output, and aux."""

  def loss(state, x_BLD):
    y_BLD, aux = nnx.merge(graphdef, state)(x_BLD, Context(mask_BL, train=True))
    return jnp.sum(y_BLD * cotangent_BLD), (y_BLD, aux)

  return jax.grad(loss, argnums=(0, 1), has_aux=True)(state, x_BLD)


def forward(moe, x_BLD, mask_BL=MASK_BL):
  return jax.device_get(run(*nnx.split(moe), x_BLD, mask_BL, np.zeros_like(x_BLD))[1])


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_output_and_gradients_equal_the_loop(activation):
  moe, x_BLD = make(experts=activation), inputs()
  cotangent_BLD = np.random.default_rng(2).normal(size=x_BLD.shape).astype(np.float32)
  (d_state, d_x_BLD), (y_BLD, _) = run(*nnx.split(moe), x_BLD, MASK_BL, cotangent_BLD)
  w, x64_BLD = weights_of(moe), x_BLD.astype(np.float64)
  np.testing.assert_allclose(y_BLD, loop(w, x64_BLD, MASK_BL)[0], rtol=1e-4, atol=1e-5)
  assert (y_BLD[~MASK_BL] == 0).all()

  gradients = weights_of(nnx.merge(nnx.graphdef(moe), d_state)) | {"x": np.asarray(d_x_BLD)}
  loss = lambda w: np.sum(loop(w, w["x"], MASK_BL)[0] * cotangent_BLD)
  assert_gradients(loss, w | {"x": x64_BLD}, gradients, at_least=0.01)


def test_counts_are_what_tokens_take_of_each_expert():
  moe, x_BLD = make(), inputs()
  _, aux = forward(moe, x_BLD)
  _, used_BLE = loop(weights_of(moe), x_BLD.astype(np.float64), MASK_BL)
  np.testing.assert_allclose(aux.tokens_per_expert_BE, used_BLE.sum(axis=1), rtol=1e-5)
  np.testing.assert_allclose(aux.tokens_per_expert_BE.sum(axis=1), MASK_BL.sum(axis=1), rtol=1e-5)
  # Nothing drops. Two float32 sums of the same B*L*C positive terms, each rounded at most once per term by 2**-24.
  rounding = B * L * C * 2.0**-23
  np.testing.assert_allclose(aux.kept_per_expert_E, aux.tokens_per_expert_BE.sum(axis=0), rtol=rounding)
  entropy = -np.sum(used_BLE[MASK_BL] * np.log(used_BLE[MASK_BL]))
  np.testing.assert_allclose(aux.metrics["router_entropy"][0], entropy, rtol=1e-5)
  assert aux.metrics["router_entropy"][1] == MASK_BL.sum() and aux.losses == {}


def test_permuting_experts_changes_nothing():
  moe, x_BLD, order = make(), inputs(), np.array([2, 0, 1])
  y_BLD, aux = forward(moe, x_BLD)
  for name, variable in parameters(moe).items():
    if "E" in name:
      axis = name.split("_")[-1].index("E")
      variable.set_value(jnp.take(variable.get_value(), order, axis=axis))
  permuted_BLD, permuted = forward(moe, x_BLD)
  np.testing.assert_allclose(permuted_BLD, y_BLD, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(permuted.tokens_per_expert_BE, aux.tokens_per_expert_BE[:, order], rtol=1e-4)


def test_padding_changes_nothing_whatever_it_holds():
  moe, x_BLD = make(), inputs()
  cotangent_BLD = np.ones_like(x_BLD)
  before = run(*nnx.split(moe), x_BLD, MASK_BL, cotangent_BLD)
  huge_BLD = np.where(MASK_BL[..., None], x_BLD, np.float32(np.inf))
  after = run(*nnx.split(moe), huge_BLD, MASK_BL, cotangent_BLD)
  jax.tree.map(np.testing.assert_array_equal, before, after)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
  # Nor does a longer sequence of which the rest is padding: the first tokens are all that there is.
  y_BLD, _ = forward(moe, x_BLD)
  short_BLD, _ = forward(moe, x_BLD[:, :3], MASK_BL[:, :3])
  np.testing.assert_allclose(short_BLD[1], y_BLD[1, :3], rtol=1e-5, atol=1e-6)


def test_later_tokens_reach_earlier_ones_of_their_own_sequence():
  moe, x_BLD = make(), inputs()
  changed_BLD = x_BLD.copy()
  changed_BLD[0, -1] += 1
  y_BLD, _ = forward(moe, x_BLD)
  other_BLD, _ = forward(moe, changed_BLD)
  assert np.abs(other_BLD[0, 0] - y_BLD[0, 0]).max() > 1e-3
  np.testing.assert_array_equal(other_BLD[1], y_BLD[1])


def test_shared_experts_see_every_token():
  moe, x_BLD = make(), inputs()
  plain_BLD, _ = forward(moe, x_BLD)
  moe.shared = MLP(D, F, rngs=nnx.Rngs(1))
  y_BLD, _ = forward(moe, x_BLD)
  np.testing.assert_allclose(y_BLD - plain_BLD, moe.shared(x_BLD)[0], rtol=1e-4, atol=1e-5)


def test_the_weights_are_float32_and_the_rows_the_type_of_the_input():
  moe, x_BLD = make(), inputs().astype(jnp.bfloat16)
  y_BLD, aux = forward(moe, x_BLD)
  assert y_BLD.dtype == jnp.bfloat16
  assert {leaf.dtype for leaf in jax.tree.leaves(aux)} == {np.dtype(np.float32)}
  want_BLD, _ = loop(weights_of(moe), x_BLD.astype(np.float64), MASK_BL)
  np.testing.assert_allclose(y_BLD.astype(np.float64), want_BLD, atol=0.05 * np.abs(want_BLD).max())


def test_experts_draw_in_training_only():
  moe, x_BLD = make(experts="expert_dropout:0.4"), inputs()
  keys_B = jax.random.split(jax.random.key(0), B)
  given = Context(MASK_BL, key_B=keys_B, step_key=keys_B[0])
  contexts = (
    Context(MASK_BL),
    given,
    given._replace(train=True),
    given._replace(train=True, step_key=keys_B[1]),
  )
  plain, evaluated, drawn, other = jax.jit(lambda moe: [moe(x_BLD, context)[0] for context in contexts])(moe)
  assert plain.shape == x_BLD.shape
  np.testing.assert_array_equal(evaluated, plain)
  assert min(np.abs(drawn - plain).max(), np.abs(drawn - other).max()) > 1e-2


# --- in the model ---

CONFIG = tiny.change(
  tiny.CONFIG, ffn="soft_moe:2", accept_leaks="soft_moe", balancers="none", jitter=0.0, num_layers=1
)


def test_a_model_trains_with_it():
  result = tiny.one_step(CONFIG, tiny.make_batch())
  metrics = result["metrics"]
  assert np.isfinite(metrics["loss"]) and metrics["loss"] == metrics["total_loss"]
  np.testing.assert_allclose(metrics["dropped_fraction"], 0, atol=1e-5)
  np.testing.assert_allclose(
    metrics["tokens_per_expert"].sum(), tiny.make_batch()["mask_BL"].sum(), rtol=1e-5
  )
  moved = {
    jax.tree_util.keystr(path): np.abs(g).max() for path, g in jax.tree.leaves_with_path(result["gradients"])
  }
  of_layer = {name: size for name, size in moved.items() if "'ffn'" in name}
  assert len(of_layer) == 5 and all(size > 0 for size in of_layer.values())


def test_a_causal_model_refuses_it_unless_it_is_accepted_by_name():
  check_causal(resolve(CONFIG.model))
  for accepted in ("", "softmax_topk"):
    refused = resolve(tiny.change(CONFIG, accept_leaks=accepted).model)
    with pytest.raises(InputError, match=r"--ffn=soft_moe:2: .* --accept_leaks=soft_moe"):
      check_causal(refused)
  check_causal(dataclasses.replace(refused, causal=False))  # where every token may see all others


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    ({"ffn": "soft_mo"}, "unknown ffn 'soft_mo': did you mean soft_moe"),
    ({"ffn": "soft_moe:0"}, "slots must be at least 1, got 0"),
    ({"ffn": "soft_moe:size=2"}, "no option 'size'; options: slots=1"),
    ({"balancers": "switch_loss"}, "--balancers=switch_loss: --ffn=soft_moe:2 does not route"),
    ({"router": "top_p"}, "--router=top_p: --ffn=soft_moe:2 does not route"),
    ({"jitter": 0.1}, "--jitter=0.1: --ffn=soft_moe:2 does not route; leave it at 0.0"),
  ],
)
def test_wrong_settings_are_one_line_errors(fields, words):
  with pytest.raises(InputError) as error:
    resolve(tiny.change(CONFIG, **fields).model)
  assert words in str(error.value) and "\n" not in str(error.value)
