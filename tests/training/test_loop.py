"""A run from start to result: it can be resumed, stops at non-finite values, and is reproducible."""

import json
import math
import pathlib

import jax
import numpy as np
import pytest

from moe_jax.config import MeshConfig
from moe_jax.data import load_dataset
from moe_jax.errors import InputError
from moe_jax.sharding import make_mesh
from moe_jax.training.checkpoint import Checkpoints
from moe_jax.training.compiled import check_run, compile_steps
from moe_jax.training.loop import Run
from moe_jax.training.metric_writer import read_jsonl
from tests import tiny

GOLDEN = pathlib.Path(__file__).parent / "golden_loss_curve.json"
CONFIG = tiny.change(tiny.CONFIG, num_steps=6, eval_batches=4, clip_norm=1.0)


@pytest.fixture(scope="module")
def dataset():
  return load_dataset(CONFIG.data)


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
  """(folder, result) of an uninterrupted run."""
  folder = tmp_path_factory.mktemp("finished")
  return folder, Run(CONFIG, dataset, folder, label="arm").train()


class StopsAt:
  """Stands for the progress display of a run that the user stops."""

  def __init__(self, step):
    self.step = step

  def start_run(self, label, num_steps): ...

  def finish_run(self): ...

  def note(self, text): ...

  def update(self, step, *numbers):
    if step == self.step:
      raise KeyboardInterrupt


def _without_times(lines):
  return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


def test_a_stopped_run_continues_to_the_same_numbers(finished, dataset, tmp_path):
  folder, expected = finished
  config = tiny.change(CONFIG, checkpoint_every=2)
  with pytest.raises(KeyboardInterrupt):
    Run(config, dataset, tmp_path, progress=StopsAt(5), label="arm").train()
  assert not (tmp_path / "result.json").exists()
  result = Run(config, dataset, tmp_path, label="arm").train()
  assert result["validation"] == expected["validation"]
  for key in ("loss", "max_vio", "dropped_fraction", "tail_steps"):
    assert result["training"][key] == expected["training"][key]
  lines = [read_jsonl(f / "metrics.jsonl") for f in (tmp_path, folder)]
  assert [line["step"] for line in lines[0]] == [1, 2, 3, 4, 5, 6]
  assert _without_times(lines[0]) == _without_times(lines[1])


def test_the_result_holds_what_the_report_reads(finished, dataset):
  folder, result = finished
  assert json.loads((folder / "result.json").read_text()) == result
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
    InputError, match=r"--learning_rate=1e\+18: .* at step \d; the checkpoint of step \d in "
  ):
    Run(config, dataset, tmp_path).train()
  steps = compile_steps(config, tiny.VOCAB, tiny.DOMAINS, make_mesh(config.mesh))
  checkpoints = Checkpoints(tmp_path / "checkpoints")
  state, _ = checkpoints.restore(steps.abstract_state, steps.state_shardings)
  assert int(state.step) == checkpoints.latest_step >= 1
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
  assert not (tmp_path / "result.json").exists()


def test_runs_that_differ_in_seeds_share_their_compiled_steps():
  mesh = make_mesh(CONFIG.mesh)
  other = tiny.change(CONFIG, seed=3, data_seed=4)
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
  config = tiny.change(tiny.CONFIG, num_steps=20, eval_batches=1, clip_norm=1.0)
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
