"""A run from start to result: it can be resumed, stops at non-finite values, and is reproducible."""

import json
import math
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import disk
from moe_jax.config import MeshConfig
from moe_jax.data import load_dataset
from moe_jax.errors import InputError
from moe_jax.ops.balancing import Balancer
from moe_jax.sharding import make_mesh
from moe_jax.training import continuing, loop
from moe_jax.training.checkpoint import Checkpoints
from moe_jax.training.compiled import check_run, compile_steps
from moe_jax.training.loop import Run
from moe_jax.training.metric_writer import read_jsonl
from moe_jax.training.objectives import NextToken
from moe_jax.training.result_file import read_result
from tests import tiny

GOLDEN = pathlib.Path(__file__).parent / "golden_loss_curve.json"
CONFIG = tiny.change(
  tiny.CONFIG, num_steps=6, eval_batches=4, clip_norm=1.0, hooks="average_parameters:decay=0.5"
)


@pytest.fixture(scope="module")
def dataset():
  return load_dataset(CONFIG.data)


class KeepsState(Run):
  """Keeps the state that it evaluates last."""

  def evaluate(self, state, step=None):
    self.state = jax.device_get(state)
    return super().evaluate(state, step)


@pytest.fixture(scope="module")
def finished_run(dataset, tmp_path_factory):
  """(run, result) of an uninterrupted run."""
  run = KeepsState(CONFIG, dataset, tmp_path_factory.mktemp("finished"), label="arm")
  return run, run.train()


@pytest.fixture(scope="module")
def finished(finished_run):
  """(folder, result) of it."""
  run, result = finished_run
  return run.folder, result


def _without_times(lines):
  return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


def test_a_stopped_run_continues_to_the_same_numbers(finished_run, dataset, tmp_path):
  run, expected = finished_run
  config = tiny.change(CONFIG, checkpoint_every=2)
  with pytest.raises(KeyboardInterrupt):
    Run(config, dataset, tmp_path, progress=tiny.StopsAt(5), label="arm").train()
  assert not (tmp_path / "result.json").exists()
  continued = KeepsState(config, dataset, tmp_path, label="arm")
  result = continued.train()
  jax.tree.map(np.testing.assert_array_equal, continued.state, run.state)  # optimizer and hooks, too
  assert result["validation"] == expected["validation"]
  for key in ("loss", "max_vio", "dropped_fraction", "tail_steps"):
    assert result["training"][key] == expected["training"][key]
  lines = [read_jsonl(f / "metrics.jsonl") for f in (tmp_path, run.folder)]
  assert [line["step"] for line in lines[0]] == [1, 2, 3, 4, 5, 6]
  assert _without_times(lines[0]) == _without_times(lines[1])


def test_the_result_holds_what_the_report_reads(finished, dataset):
  folder, result = finished
  assert read_result(folder / "result.json") == result
  layers, experts = CONFIG.model.num_layers, CONFIG.model.moe.num_experts
  validation = result["validation"]
  assert validation["perplexity"] == pytest.approx(math.exp(validation["nll"]))
  assert np.shape(validation["load"]) == (layers, experts)
  assert np.shape(validation["load_by_domain"]) == (layers, tiny.DOMAINS, experts)
  np.testing.assert_allclose(np.sum(validation["load"], axis=1), 1, rtol=1e-6)
  # signed, of the summed counts
  np.testing.assert_allclose(
    validation["max_vio"], np.max(validation["load"], axis=1) * experts - 1, rtol=1e-5
  )
  assert result["fingerprint"] == dataset.info.fingerprint
  assert result["validation_floor"] <= validation["nll"]
  assert result["training"]["tail_steps"] == math.ceil(0.2 * CONFIG.train.num_steps)
  assert (result["active_width"], result["slots"], result["inputs"]) == (
    32,
    "capacity 1/2 per group of 16",
    "",
  )
  assert list(folder.glob("tensorboard/*")) == []  # --notensorboard


def test_parameters_are_counted(finished):
  _, result = finished
  m, moe = CONFIG.model, CONFIG.model.moe
  per_expert = 3 * m.model_dim * moe.expert_dim
  attention = m.model_dim * m.head_dim * (2 * m.num_heads + 2 * m.num_kv_heads)
  rest = attention + 2 * m.model_dim + m.model_dim * moe.num_experts
  outside = 2 * tiny.VOCAB * m.model_dim + m.model_dim
  for key, experts in (("num_params", moe.num_experts), ("num_active_params", moe.num_experts_per_token)):
    assert result[key] == outside + m.num_layers * (rest + experts * per_expert)


def test_evaluation_does_not_depend_on_the_batch_size(finished, dataset, tmp_path):
  folder, result = finished
  whole = tiny.change(CONFIG, batch_size=32, eval_batches=1)  # the same 32 windows
  run = Run(whole, load_dataset(whole.data), tmp_path)
  with jax.set_mesh(run.mesh):
    steps = compile_steps(whole, tiny.VOCAB, tiny.DOMAINS, run.mesh)
    state, _ = Checkpoints(folder / "checkpoints").restore(steps.abstract_state, steps.state_shardings)
    run.steps = steps
    validation = run.evaluate(state)
  assert validation["num_tokens"] == result["validation"]["num_tokens"]
  for key in ("nll", "max_vio", "mutual_information", "router_entropy", "dropped_fraction"):
    np.testing.assert_allclose(validation[key], result["validation"][key], rtol=1e-5, atol=1e-7)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(dataset, tmp_path):
  config = tiny.change(CONFIG, learning_rate=1e18, warmup_steps=4, checkpoint_every=1)
  with pytest.raises(
    InputError,
    match=r"the run has .* at step \d; the checkpoint of step \d in .*--learning_rate \(now 1e\+18\)",
  ):
    Run(config, dataset, tmp_path).train()
  steps = compile_steps(config, tiny.VOCAB, tiny.DOMAINS, make_mesh(config.mesh))
  checkpoints = Checkpoints(tmp_path / "checkpoints")
  state, _ = checkpoints.restore(steps.abstract_state, steps.state_shardings)
  assert int(state.step) == checkpoints.latest_step >= 1
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
  assert not (tmp_path / "result.json").exists()


class InfiniteSlope(NextToken):
  """The likelihood plus a term that is zero and has no derivative."""

  def token_losses(self, logits_BLV, targets_BL):
    return super().token_losses(logits_BLV, targets_BL) + jnp.sqrt(0 * logits_BLV[..., 0])


def test_a_gradient_that_is_not_finite_stops_a_run_whose_loss_is(dataset, tmp_path):
  config = tiny.change(CONFIG, objective=InfiniteSlope, hooks="", num_layers=1)
  with pytest.raises(
    InputError, match=r"norm nan at step 1; there is no earlier .* the learning rate is not the reason"
  ):
    Run(config, dataset, tmp_path).train()
  assert not list(tmp_path.glob("checkpoints/*/")) and not (tmp_path / "result.json").exists()


def of_nan():
  return Balancer(losses=lambda state, routing, stats: {"term": jnp.float32(jnp.nan)})


def test_a_balancing_loss_that_is_not_finite_stops_a_run_whose_loss_and_gradient_are(dataset, tmp_path):
  """It is constant, so no other number shows it."""
  config = tiny.change(CONFIG, balancers=of_nan, num_layers=1)
  wanted = r"the run has balancing loss of_nan nan at step 1; there is no earlier checkpoint"
  with pytest.raises(InputError, match=wanted):
    Run(config, dataset, tmp_path).train()
  assert not (tmp_path / "result.json").exists()


class Clock:
  """Time passes only where `costs` says: the first training step of a process compiles for 100 s, others take 2 s."""

  def __init__(self, monkeypatch):
    self.now = 0.0
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(monotonic=lambda: self.now))
    monkeypatch.setattr(loop, "compile_steps", self.compile_steps)
    monkeypatch.setattr(Checkpoints, "save", self.costs(50.0, Checkpoints.save))

  def costs(self, *seconds: float):
    *seconds, function = seconds
    remaining = iter(seconds[:-1])

    def timed(*args, **more):
      self.now += next(remaining, seconds[-1])
      return function(*args, **more)

    return timed

  def compile_steps(self, *args):
    steps = compile_steps(*args)
    return steps._replace(
      train=self.costs(100.0, 2.0, steps.train), evaluate=self.costs(1000.0, steps.evaluate)
    )


def test_speed_leaves_out_compilation_evaluation_and_saving_and_survives_a_stop(
  dataset, tmp_path, monkeypatch
):
  clock = Clock(monkeypatch)
  config = tiny.change(CONFIG, eval_every=1, checkpoint_every=2, log_every=2)
  with pytest.raises(KeyboardInterrupt):
    Run(config, dataset, tmp_path, progress=tiny.StopsAt(3)).train()
  result = Run(config, dataset, tmp_path).train()
  # timed: step 2 before the stop, whose checkpoint is continued from, and steps 4 to 6 behind it
  training = result["training"]
  assert (training["seconds"], training["compile_seconds"]) == (8.0, 100.0)
  assert training["tokens_per_second"] == pytest.approx(8 * 16 / 2)
  speeds = [
    line.get("tokens_per_second") for line in read_jsonl(tmp_path / "metrics.jsonl") if "loss" in line
  ]
  assert speeds == [None, 64.0, 64.0, 64.0, 64.0, 64.0]
  assert clock.now > 1000


def test_a_run_of_one_step_has_no_speed(dataset, tmp_path):
  result = Run(tiny.change(CONFIG, num_steps=1, eval_batches=1), dataset, tmp_path).train()
  assert result["training"]["tokens_per_second"] is None and read_result(tmp_path / "result.json") == result


def test_evaluations_and_checkpoints_happen_at_their_steps_and_the_newest_two_stay(
  dataset, tmp_path, monkeypatch
):
  saved, save = [], Checkpoints.save
  monkeypatch.setattr(
    Checkpoints,
    "save",
    lambda self, step, *args, **more: (saved.append(step), save(self, step, *args, **more)),
  )
  Run(tiny.change(CONFIG, eval_every=3, checkpoint_every=2, log_every=4), dataset, tmp_path).train()
  lines = read_jsonl(tmp_path / "metrics.jsonl")
  assert [line["step"] for line in lines if "eval_nll" in line] == [3]  # that of the last step is the result
  assert [line["step"] for line in lines if "loss" in line] == [1, 3, 4, 6]
  assert saved == [2, 4, 6]
  assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [4, 6]


def test_a_run_that_has_reached_its_target_ends_there(dataset, tmp_path, monkeypatch):
  """At the first evaluation of which `stop` is true; again so if the process ends before the result is written."""
  asked = []

  def stop(validation):
    asked.append(validation["nll"])
    return len(asked) > 1 and validation["nll"] == asked[1]

  write = disk.write_json
  with monkeypatch.context() as patch:
    patch.setattr(disk, "write_json", lambda path, *args: path.name == "result.json" or write(path, *args))
    expected = Run(tiny.change(CONFIG, eval_every=1), dataset, tmp_path, stop=stop).train()
  assert expected["num_steps"] == 2 and expected["validation"]["nll"] == asked[1] != asked[0]
  assert not (tmp_path / "result.json").exists()
  result = Run(tiny.change(CONFIG, eval_every=1), dataset, tmp_path, stop=stop).train()
  assert result["validation"] == expected["validation"] and result["num_steps"] == 2 and len(asked) == 3
  lines = read_jsonl(tmp_path / "metrics.jsonl")
  assert [line["step"] for line in lines if "loss" in line] == [1, 2]
  assert [line["eval_nll"] for line in lines if "eval_nll" in line] == asked[:2]


def test_a_run_stopped_within_a_save_continues_at_once(finished_run, dataset, tmp_path, monkeypatch):
  run, _ = finished_run
  save, close, closed = Checkpoints.save, Checkpoints.close, []

  def stopped(self, step, *args, **more):
    save(self, step, *args, **more)  # still writes in the background
    if step == 4:
      raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(Checkpoints, "save", stopped)
    patch.setattr(Checkpoints, "close", lambda self: (close(self), closed.append(self.folder)))
    with pytest.raises(KeyboardInterrupt):
      Run(tiny.change(CONFIG, checkpoint_every=2), dataset, tmp_path).train()
  assert closed == [tmp_path / "checkpoints"]
  progress, saved_by = tiny.StopsAt(0), continuing.of_package()
  monkeypatch.setattr(continuing, "of_package", lambda: "0" * 12)
  continued = KeepsState(CONFIG, dataset, tmp_path, progress, show="mine")
  continued.train()
  other = f", which other code of moe_jax saved (digest {saved_by}, now {'0' * 12})"
  assert progress.notes == [f"mine: continues from step 4{other}"]
  assert [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
  jax.tree.map(np.testing.assert_array_equal, continued.state, run.state)


def test_runs_that_differ_in_seeds_share_their_compiled_steps():
  mesh = make_mesh(CONFIG.mesh)
  other = tiny.change(CONFIG, seed=3, data_seed=4, checkpoint_every=5, log_every=7)
  one, two, three = (
    compile_steps(c, tiny.VOCAB, tiny.DOMAINS, mesh) for c in (CONFIG, other, tiny.change(CONFIG, jitter=0.2))
  )
  assert one is two and one is not three


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"group_size": 24}, "--group_size=24: must divide sequence_length=16"),
    ({"group_size": 256}, "--group_size=256: .* 128 tokens of a micro-batch"),
    ({"mesh": MeshConfig(data=8), "accumulation": 2}, "--batch_size.*4 sequences.*8 devices"),
  ],
)
def test_what_only_the_whole_configuration_shows(fields, message):
  config = tiny.change(CONFIG, **fields)
  with pytest.raises(InputError, match=message):
    check_run(config, make_mesh(config.mesh))


def _curve(folder: pathlib.Path, data) -> list[float]:
  config = tiny.change(tiny.CONFIG, num_steps=20, eval_batches=1, clip_norm=1.0, remat="full")
  Run(config, data, folder).train()
  return [line["loss"] for line in read_jsonl(folder / "metrics.jsonl")]


def test_golden_run(dataset, tmp_path):
  """20 steps give the stored losses. If a change means to change them: `python -m tests.training.test_loop`."""
  expected = json.loads(GOLDEN.read_text())
  curve = _curve(tmp_path, dataset)
  assert len(curve) == len(expected) == 20
  np.testing.assert_allclose(curve, expected, rtol=2e-4)


if __name__ == "__main__":
  import tempfile

  with tempfile.TemporaryDirectory() as temporary:
    GOLDEN.write_text(json.dumps(_curve(pathlib.Path(temporary), load_dataset(CONFIG.data))) + "\n")
