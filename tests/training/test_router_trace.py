"""Recorded router logits of a run are what the model computed, and how the step was cut changes nothing."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from moe_jax import sharding
from moe_jax.config import BlockConfig, MeshConfig, Segment
from moe_jax.data import load_dataset
from moe_jax.errors import InputError
from moe_jax.ops.routing.common import select_top_k
from moe_jax.training.checkpoint import Checkpoints
from moe_jax.training.compiled import check_run, compile_steps
from moe_jax.training.loop import Run
from moe_jax.training.metric_writer import read_jsonl
from moe_jax.training.router_trace import Trace
from tests import tiny

CONFIG = tiny.change(
  tiny.CONFIG, num_steps=6, eval_batches=1, record_router_logits=1, router_logits_dtype="float32"
)


@pytest.fixture(scope="module")
def dataset():
  return load_dataset(CONFIG.data)


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
  folder = tmp_path_factory.mktemp("finished")
  return folder, Run(CONFIG, dataset, folder).train()


def test_a_run_records_its_batches(finished, dataset):
  folder, _ = finished
  trace, model = Trace(folder), CONFIG.model
  assert trace.shape == (model.num_layers, 8, 16, model.moe.num_experts)
  assert trace.header["config"] == json.loads(json.dumps(CONFIG.to_dict()))
  assert {k: trace.header[k] for k in ("num_experts_per_token", "group_size", "capacity")} == {
    "num_experts_per_token": 2,
    "group_size": 16,
    "capacity": 4,
  }
  batches = dataset.train_batches(data_seed=0)
  for steps in trace.chunks(1):
    batch = next(batches)
    np.testing.assert_array_equal(steps.mask_IBL[0], batch["mask_BL"])
    np.testing.assert_array_equal(steps.domain_IB[0], batch["domain_B"])


def test_recording_changes_no_number_of_the_run(finished, dataset, tmp_path):
  folder, _ = finished
  Run(tiny.change(CONFIG, record_router_logits=0), dataset, tmp_path).train()
  assert not (tmp_path / "router_logits").exists()
  lines = [read_jsonl(f / "metrics.jsonl") for f in (folder, tmp_path)]
  for recorded, plain in zip(*lines, strict=True):
    assert recorded.keys() == plain.keys()
    np.testing.assert_allclose(recorded["loss"], plain["loss"], rtol=1e-6)
    assert recorded["tokens_per_expert"] == plain["tokens_per_expert"]


def test_a_stopped_run_records_no_step_twice(finished, dataset, tmp_path, monkeypatch):
  folder, _ = finished
  config = tiny.change(CONFIG, checkpoint_every=2)
  save, written = Checkpoints.save, []

  def noted(self, step, state, extra, **more):
    written.append((step, len(Trace(tmp_path))))
    save(self, step, state, extra, **more)

  monkeypatch.setattr(Checkpoints, "save", noted)
  with pytest.raises(KeyboardInterrupt):
    Run(config, dataset, tmp_path, progress=tiny.StopsAt(5)).train()
  assert len(Trace(tmp_path)) == 5  # more than the checkpoint
  Run(config, dataset, tmp_path).train()
  # Also after a kill no step before a checkpoint is missing.
  assert {step for step, _ in written} == {2, 4, 6} and all(step == steps for step, steps in written)
  for one, other in zip(Trace(tmp_path).read(0, 9), Trace(folder).read(0, 9), strict=True):
    np.testing.assert_array_equal(one, other)


def test_every_third_step(finished, dataset, tmp_path):
  folder, _ = finished
  Run(tiny.change(CONFIG, record_router_logits=3), dataset, tmp_path).train()
  assert Trace(tmp_path).step_I.tolist() == [3, 6]
  np.testing.assert_array_equal(
    Trace(tmp_path).read(1, 2).logits_IRBLE, Trace(folder).read(5, 6).logits_IRBLE
  )


def test_a_layer_without_a_router_is_refused():
  config = tiny.change(CONFIG, ffn="soft_moe", accept_leaks="soft_moe", balancers="none", jitter=0.0)
  with pytest.raises(InputError, match="--record_router_logits=1: --ffn=soft_moe has no router"):
    check_run(config, sharding.make_mesh(config.mesh))


# One step of it, however it is cut


def recorded_step(**fields) -> dict[str, np.ndarray]:
  return tiny.one_step(tiny.change(CONFIG, **fields), tiny.make_batch())["metrics"]


@pytest.mark.parametrize(
  "fields",
  [
    {"accumulation": 4},
    {"mesh": MeshConfig(data=8, expert=1)},
    {"mesh": MeshConfig(data=2, expert=2), "accumulation": 2},
    {"scan_layers": False},
  ],
  ids=lambda fields: "-".join(f"{k}={v}" for k, v in fields.items()),
)
def test_the_trace_does_not_depend_on_how_the_step_is_cut(fields):
  expected, found = recorded_step()["router_trace"], recorded_step(**fields)["router_trace"]
  np.testing.assert_allclose(found["logits_RBLE"], expected["logits_RBLE"], rtol=2e-5, atol=2e-5)
  for name in ("mask_BL", "domain_B", "key_B"):
    np.testing.assert_array_equal(found[name], expected[name])
  # Otherwise the order of the sequences would be checked by nothing.
  rows = expected["logits_RBLE"][0]
  assert np.abs(rows[1:] - rows[:-1]).max(axis=(1, 2)).min() > 0.1


def test_the_logits_are_those_of_the_choices_of_each_layer():
  """Without a bias the K highest logits of each valid token are its experts. A segment repeats two blocks with experts."""
  segments = (Segment((BlockConfig(), BlockConfig()), 2),)
  metrics = recorded_step(balancers="none", num_layers=3, segments=segments)
  trace = metrics["router_trace"]
  order = np.argsort(-trace["logits_RBLE"], axis=-1)[..., :2]
  chosen_RBLE = np.any(order[..., None] == np.arange(8), axis=-2) & trace["mask_BL"][None, :, :, None]
  assert len(chosen_RBLE) == 4
  np.testing.assert_array_equal(chosen_RBLE.sum(axis=(1, 2)), metrics["tokens_per_expert"])


def test_layers_with_other_numbers_of_experts_are_refused():
  """They would be one array."""
  blocks = tuple(BlockConfig(moe=dataclasses.replace(CONFIG.model.moe, num_experts=e)) for e in (4, 8))
  config = tiny.change(CONFIG, num_layers=3, segments=(Segment(blocks),))
  with pytest.raises(InputError, match="--record_router_logits=1: layers have different numbers of experts"):
    check_run(config, sharding.make_mesh(config.mesh))


def test_without_recording_the_step_gives_no_logits():
  config = tiny.change(CONFIG, record_router_logits=0)
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    steps = compile_steps(config, tiny.VOCAB, tiny.DOMAINS, mesh)
    _, metrics = jax.eval_shape(steps.train, steps.abstract_state, tiny.make_batch())
  assert "router_trace" not in metrics
  assert max(x.size for x in jax.tree.leaves(metrics)) == 2 * 8  # tokens per expert of two layers


def flipped(logits_TE: np.ndarray, rounded_TE: np.ndarray) -> float:
  """Share of tokens that choose other experts."""
  choice = lambda x: np.sort(np.asarray(select_top_k(np.asarray(x, np.float32), None, 2)), axis=1)
  return float(np.any(choice(logits_TE) != choice(rounded_TE), axis=1).mean())


def test_how_many_choices_rounding_flips():
  """float16 flips about one in two thousand, and only ties: bfloat16 would flip eight times as many."""
  logits_TE = np.random.default_rng(0).normal(size=(40_000, 16)).astype(np.float32) * 2
  half = flipped(logits_TE, logits_TE.astype(np.float16))
  brain = flipped(logits_TE, logits_TE.astype(jax.numpy.bfloat16))
  assert 0 < half < 1e-3
  assert 4 < brain / half < 16


def test_a_group_of_sequences_stays_together_and_the_trace_is_in_order():
  from moe_jax.training.step import _cut, _router_trace

  cut = _cut({"x": np.arange(12)}, pieces=2, together=3)["x"]
  assert cut.tolist() == [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]]
  logits_JRBLE = np.stack([cut, 100 + cut], axis=1)[..., None, None].astype(np.float32)
  batch = {"mask_BL": None, "domain_B": None, "key_B": None}
  found = np.asarray(_router_trace([[jax.numpy.asarray(logits_JRBLE)]], batch, 3, "float32")["logits_RBLE"])
  np.testing.assert_array_equal(found[..., 0, 0], [np.arange(12), 100 + np.arange(12)])


def test_logits_beyond_float16_stay_numbers():
  from moe_jax.training.step import _router_trace

  logits = np.array([1e30, -1e30, 3.0, 1e-30], np.float32).reshape(1, 1, 1, 1, 4)
  batch = {"mask_BL": None, "domain_B": None, "key_B": None}
  found = np.asarray(_router_trace([[jax.numpy.asarray(logits)]], batch, 1, "float16")["logits_RBLE"])
  assert found.ravel().tolist() == [65504.0, -65504.0, 3.0, 0.0]
