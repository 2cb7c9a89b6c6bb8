"""A recorded run is used again by the same command, also with flags that change nothing, and by no other."""

import pathlib

import numpy as np
import pytest
from rich.console import Console

from moe_jax.analysis import recording
from moe_jax.data import load_dataset
from moe_jax.errors import InputError
from moe_jax.training.identity import write_identity
from moe_jax.training.protocol import trace_header
from moe_jax.training.result_file import write_result
from moe_jax.training.router_trace import FOLDER, TraceWriter
from tests import tiny
from tests.comparison.made_results import make_result
from tests.data.helpers import write_files


@pytest.fixture
def base(tmp_path):
  files = {f"news/{i}.txt": f"number {i} of these\n" * 20 for i in range(20)}
  text = str(write_files(tmp_path / "corpus", files))
  return tiny.change(tiny.CONFIG, dataset="text_folder", text_folder=text, schedule="constant")


@pytest.fixture
def folder(base, tmp_path):
  """As a run of two steps leaves it, without training."""
  config, folder = recording.with_recording(base, 2), tmp_path / "run"
  dataset = load_dataset(config.data)
  shape = recording.trace_shape(config)
  arrays = {"logits_RBLE": np.zeros(shape, np.float16), "mask_BL": np.ones(shape[1:3], bool)}
  arrays |= {"domain_B": np.zeros(shape[1], np.int32), "key_B": np.zeros((shape[1], 2), np.uint32)}
  with TraceWriter(folder / FOLDER, trace_header(config, dataset.info)) as writer:
    for step in (1, 2):
      writer.add(step, arrays)
  write_identity(folder, config, dataset)
  write_result(folder / "result.json", make_result() | {"config": config.to_dict()})
  return folder


class Trains(Exception):
  pass


@pytest.fixture
def record(folder, monkeypatch):
  def train(self):
    raise Trains

  monkeypatch.setattr(recording.Run, "train", train)
  quiet = Console(quiet=True)
  return lambda config, steps=2: recording.record(recording.with_recording(config, steps), folder, quiet)


def test_flags_that_change_nothing_may_change(base, record):
  changed = tiny.change(base, max_minutes=1.0, log_every=7, checkpoint_every=5, tensorboard=True)
  assert len(record(changed)) == 2


def test_another_run_is_refused(base, record):
  with pytest.raises(InputError, match=r"another configuration \(num_experts was 8, now 16\)"):
    record(tiny.change(base, num_experts=16))


def test_other_text_is_refused(base, record):
  write_files(pathlib.Path(base.data.text_folder), {"news/3.txt": "other words\n" * 20})
  with pytest.raises(InputError, match="holds a run on other text"):
    record(base)


def test_more_steps_and_a_damaged_result_are_trained(base, record, folder):
  with pytest.raises(Trains):
    record(base, 3)
  (folder / "result.json").write_text("{")
  with pytest.raises(Trains):
    record(base)
