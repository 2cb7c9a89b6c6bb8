"""Replaying a run's own balancer reproduces the run. Replaying another one matches slow loops over the same logits."""

import csv
import dataclasses
import json
import math
import types

import numpy as np
import pytest

from moe_jax import sharding
from moe_jax.analysis.replay.replay import bias_methods, replay
from moe_jax.config import BlockConfig, Segment
from moe_jax.errors import InputError
from moe_jax.ops import stats
from moe_jax.training.compiled import check_run
from moe_jax.training.protocol import trace_header
from moe_jax.training.router_trace import Trace, TraceWriter
from tests import tiny
from tests.analysis import studies
from tests.analysis.recorded import CONFIG, STEPS, train


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
  """With jitter, drops, losses and a bias, in one piece."""
  return train(tmp_path_factory.mktemp("recorded"))


@pytest.mark.parametrize(
  "fields",
  [
    {},
    {"accumulation": 4},
    {"router": "sigmoid_topk", "balancers": "loss_free_bias:0.02", "jitter": 0.0},
    {"balancers": "multiplicative_bias:0.05"},
    {"balancers": "quantile_balancing:bins=50"},
    # draws the second expert by the run's keys, which depend on the block's number
    {
      "router": "gshard_top2",
      "balancers": "loss_free_bias:0.02",
      "accept_leaks": "gshard_top2",
      "moe_every": 2,
      # groups of two sequences, which micro-batches keep together
      "accumulation": 2,
      "group_size": 32,
    },
    # whose modules are not recorded
    {"mtp_depth": 2, "objective": "next_tokens:0.5", "balancers": "loss_free_bias:0.02"},
    {"balancers": "none"},
  ],
  ids=lambda fields: "-".join(str(v) for v in fields.values()) or "all-at-once",
)
def test_replaying_a_runs_own_balancer_is_the_run(tmp_path, fields):
  """The same choices and the same biases at every step, from logits in float32."""
  run = train(tmp_path, **fields)
  config = tiny.change(CONFIG, **fields).model.moe
  result = replay(run.trace, config.balancers)
  own = slice(0, run.trace.shape[0])  # metrics have modules behind the stack, too
  np.testing.assert_array_equal(result.tokens_per_expert_IRE, run.tokens_per_expert_IRE[:, own])
  np.testing.assert_allclose(result.max_vio_IR, run.max_vio_IR[:, own], rtol=1e-6)
  assert result.step_I.tolist() == list(range(1, STEPS + 1))
  if config.balancers == "none":
    assert result.bias_IRE is None and result.final_bias_RE is None
    return
  bias = [*result.bias_IRE, result.final_bias_RE]
  assert len({b.tobytes() for b in bias}) == STEPS + 1  # it moves at every step
  for found_RE, leaves in zip(bias, run.state_leaves, strict=True):
    (expected_RE,) = [leaf for leaf in leaves if leaf.shape == found_RE.shape]
    # The sums are exact; how the compiler rounds the update itself may differ.
    np.testing.assert_allclose(found_RE, expected_RE, rtol=1e-5, atol=1e-7)


def test_layers_that_differ_are_not_replayed_as_one(recorded, tmp_path):
  blocks = tuple(BlockConfig(moe=dataclasses.replace(CONFIG.model.moe, jitter=x)) for x in (0.0, 0.1))
  config = tiny.change(CONFIG, num_layers=3, segments=(Segment(blocks),))
  header = trace_header(
    check_run(config, sharding.make_mesh(config.mesh)), types.SimpleNamespace(domains=(), fingerprint="")
  )
  assert header["layers"] == [0, 1]
  with TraceWriter(tmp_path, header) as writer:
    steps = recorded.trace.read(0, 1)
    names = ("logits_RBLE", "mask_BL", "domain_B", "key_B")
    writer.add(1, dict(zip(names, (x[0] for x in steps[1:]), strict=True)))
  with pytest.raises(InputError, match="its layers have no configuration in common"):
    replay(Trace(tmp_path), "loss_free_bias:0.01")


def test_a_header_of_ones_own_need_not_say_which_layers_there_are(recorded, tmp_path):
  header = {name: x for name, x in recorded.trace.header.items() if name != "layers"}
  steps = recorded.trace.read(0, STEPS)
  with TraceWriter(tmp_path, header) as writer:
    for i in range(STEPS):
      names = ("logits_RBLE", "mask_BL", "domain_B", "key_B")
      writer.add(i + 1, dict(zip(names, (x[i] for x in steps[1:]), strict=True)))
  found = replay(Trace(tmp_path), CONFIG.model.moe.balancers)
  np.testing.assert_array_equal(found.tokens_per_expert_IRE, recorded.tokens_per_expert_IRE)


def loops(trace: Trace, rate: float, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
  """(counts, bias) of loss-free balancing of a softmax router, in float64, one token at a time."""
  steps = trace.read(0, len(trace))
  num_steps, layers, rows, length, experts = steps.logits_IRBLE.shape
  bias = np.zeros((layers, experts))
  all_counts, all_bias = [], []
  for update in range(num_steps * rows // batch_size):
    counts = np.zeros((layers, experts))
    for sequence in range(update * batch_size, (update + 1) * batch_size):
      step, row = divmod(sequence, rows)
      for layer in range(layers):
        for position in range(length):
          if steps.mask_IBL[step, row, position]:
            x = steps.logits_IRBLE[step, layer, row, position].astype(np.float64)
            score = np.exp(x - x.max())
            score = score / score.sum() + bias[layer]
            counts[layer, np.argsort(-score, kind="stable")[:2]] += 1
    all_counts.append(counts)
    all_bias.append(bias)
    bias = bias + rate * np.sign(counts.mean(axis=1, keepdims=True) - counts)
  return np.array(all_counts), np.array(all_bias)


@pytest.mark.parametrize("batch_size", [2, 8, 12, 16, 40])
def test_another_rate_and_batch_size(recorded, batch_size):
  """Parts of steps, whole ones, several; 12 and 40 leave sequences over, of which nothing is seen."""
  result = replay(recorded.trace, "loss_free_bias:0.02", batch_size=batch_size)
  counts_IRE, bias_IRE = loops(recorded.trace, 0.02, batch_size)
  np.testing.assert_array_equal(result.tokens_per_expert_IRE, counts_IRE)
  np.testing.assert_allclose(result.bias_IRE, bias_IRE, atol=1e-6)
  updates = STEPS * 8 // batch_size
  assert result.step_I.tolist() == [math.ceil((i + 1) * batch_size / 8) for i in range(updates)]


@pytest.mark.parametrize("batch_size", [4, 8, 24])
@pytest.mark.parametrize("method", ["loss_free_bias:0.02", "quantile_balancing:bins=50"])
def test_chunks_and_pieces_change_nothing(recorded, method, batch_size):
  whole = replay(recorded.trace, method, batch_size=batch_size)
  for sizes in (
    {"chunk_steps": 1},
    {"chunk_steps": 4},
    {"piece_size": 2},
    {"piece_size": 1, "chunk_steps": 5},
  ):
    result = replay(recorded.trace, method, batch_size=batch_size, **sizes)
    np.testing.assert_array_equal(result.tokens_per_expert_IRE, whole.tokens_per_expert_IRE)
    np.testing.assert_allclose(result.bias_IRE, whole.bias_IRE, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(result.final_bias_RE, whole.final_bias_RE, rtol=1e-5, atol=1e-7)


def test_losses_beside_a_bias_do_nothing(recorded):
  alone = replay(recorded.trace, "loss_free_bias:0.02")
  beside = replay(recorded.trace, "switch_loss:1.0+loss_free_bias:0.02")
  np.testing.assert_array_equal(alone.bias_IRE, beside.bias_IRE)


def test_half_precision_flips_few_choices(recorded, tmp_path):
  with TraceWriter(tmp_path, recorded.trace.header) as writer:
    for steps in recorded.trace.chunks(1):
      names = ("logits_RBLE", "mask_BL", "domain_B", "key_B")
      arrays = dict(zip(names, (x[0] for x in steps[1:]), strict=True))
      writer.add(int(steps.step_I[0]), arrays | {"logits_RBLE": arrays["logits_RBLE"].astype(np.float16)})
  exact, rounded = (
    replay(trace, "none").tokens_per_expert_IRE for trace in (recorded.trace, Trace(tmp_path))
  )
  moved = np.abs(exact - rounded).sum() / 2
  assert moved <= 0.005 * exact.sum()


def test_tail_is_of_the_last_updates(recorded):
  result = replay(recorded.trace, "loss_free_bias:0.02")
  tail = result.tail(0.5)
  max_vio_IR = result.max_vio_IR[-3:]
  assert tail.updates == 3
  assert tail.max_vio == pytest.approx(max_vio_IR.mean())
  assert tail.max_vio_std == pytest.approx(np.std(max_vio_IR, axis=0).mean())
  summed = stats.max_vio(result.tokens_per_expert_IRE[-3:].sum(axis=0))
  assert tail.max_vio_summed == pytest.approx(float(np.mean(summed)))
  assert tail.max_vio_summed <= tail.max_vio + 1e-6  # the maximum of a mean is at most the mean of the maxima
  assert replay(recorded.trace, "none").tail().bias_std is None


def test_the_methods_of_the_registry_that_have_a_bias():
  names = bias_methods(8)
  assert {"loss_free_bias", "multiplicative_bias", "quantile_balancing"} <= set(names)
  assert not {"none", "switch_loss", "z_loss", "expert_threshold"} & set(names)


@pytest.mark.parametrize(
  ("balancers", "options", "message"),
  [
    ("switch_loss:0.1", {}, "--balancers=switch_loss:0.1: acts only through a loss"),
    ("z_loss+gshard_loss:scope=sequence", {}, "acts only through a loss"),
    ("loss_free_bia", {}, "unknown balancer 'loss_free_bia': did you mean loss_free_bias"),
    ("loss_free_bias", {"router": "noisy_topk"}, "needs more than logits, and a trace does not have it"),
    ("none", {"router": "hash_topk"}, "reads token ids, .* and a trace does not have it"),
    ("none", {"router": "moe_plus_plus"}, "scores 12 experts, and the trace has logits of 8"),
    ("none", {"batch_size": -1}, "--batch_size=-1: must be 1 or more"),
    ("none", {"batch_size": 49}, "--batch_size=49: more than the 48 recorded sequences"),
    ("none", {"batch_size": 12, "piece_size": 8}, "--batch_size=12: replayed 8 sequences at a time"),
  ],
)
def test_what_cannot_be_replayed_is_one_line(recorded, balancers, options, message):
  with pytest.raises(InputError, match=message) as caught:
    replay(recorded.trace, balancers, **options)
  assert "\n" not in str(caught.value)


# The experiment

REPLAYS = ["--methods=loss_free_bias:0.01", "--rates=0.01,0.1", "--batch_sizes=2,8"]
WRONG = [
  (["--methods=switch_loss"], "--balancers=switch_loss: acts only through a loss"),
  (["--rates=fast"], "--rates=fast: not a number (float)"),
  (["--batch_sizes=0"], "--batch_size=0: must be 1 or more"),
  (["--trace=nowhere"], "nowhere: holds no router logits; train with --record_router_logits=1"),
  (["--trace=nowhere", "--num_experts=4", "--preset=tiny"], "already; leave out --preset, --num_experts"),
  (["--trace=nowhere", "--num_steps=600", "--learning_rate=0.003"], "leave out --learning_rate, --num_steps"),
  (["--router=hash_topk"], "--router=hash_topk: router by table: reads token ids"),
  (["--record=1"], "unknown flag '--record'"),
]


def test_wrong_flags_of_the_experiment_are_one_line(tmp_path):
  studies.assert_refuses("replay", WRONG, tmp_path / "run")


def test_the_experiment_records_once_and_replays_any_run(tmp_path):
  one, two = tmp_path / "one", tmp_path / "two"
  record = [*studies.TINY_RUN, *REPLAYS, f"--output_dir={one}"]
  again = [f"--trace={one / 'run'}", *REPLAYS, f"--output_dir={two}"]
  first, second, other = studies.run("replay", [record, again, [*record, "--num_experts=16"]])
  assert first[0] == second[0] == 0, (first, second)
  plots = {"replay_max_vio.png", "replay_bias.png", "replay_oscillation.png"}
  assert {path.name for path in one.iterdir()} == {"run", "summary.csv", *plots}
  result = json.loads((one / "run" / "result.json").read_text())
  assert result["num_steps"] == 12 and result["arm"] == "none"

  with (one / "summary.csv").open(newline="") as file:
    rows = list(csv.DictReader(file))
  swept = [(f"loss_free_bias:{rate}", size) for rate in ("0.01", "0.1") for size in ("2", "4", "8")]
  # The method's rate is also in the sweep, where its row is not written a second time.
  expected = [
    ("none", "4"),
    ("loss_free_bias:0.01", "4"),
    *(s for s in swept if s != ("loss_free_bias:0.01", "4")),
  ]
  assert [(row["method"], row["batch_size"]) for row in rows] == expected
  for row in rows:
    tail = replay(Trace(one / "run"), row["method"], batch_size=int(row["batch_size"])).tail(0.25)
    written = {name: float(row[name]) for name in tail._fields if row[name]}
    assert written == pytest.approx({name: x for name, x in tail._asdict().items() if x is not None})
  assert (two / "summary.csv").read_text() == (one / "summary.csv").read_text()

  status, _, line = other
  assert status == 2 and "holds a run with another configuration (num_experts was 8, now 16)" in line
