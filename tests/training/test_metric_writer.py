"""Metrics survive writing: values, non-finite values, kills and resumes."""

import json
import math
import time

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import InputError
from moe_jax.training import metric_writer


def _events(directory):
  """[(step, tag, value or histogram)] of every event file below the folder, read back from its records."""
  from tensorboardX.proto import event_pb2

  found, purged = [], []
  for path in sorted(directory.rglob("events.out.tfevents.*")):
    data, at = path.read_bytes(), 0
    while at < len(data):
      size = int.from_bytes(data[at : at + 8], "little")  # length 8, its crc 4, payload, its crc 4
      event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
      at += 12 + size + 4
      if event.HasField("session_log"):
        purged.append(event.step)
      for value in event.summary.value:
        found.append((event.step, value.tag, value.histo if value.HasField("histo") else value.simple_value))
  return found, purged


def test_jsonl_keeps_scalars_and_arrays(tmp_path):
  path = tmp_path / "deep" / "metrics.jsonl"
  with metric_writer.JsonlWriter(path) as writer:
    writer.write(1, {"loss": np.float32(0.5), "max_vio": np.array([1.0, 2.0]), "tokens": np.int32(7)})
    writer.write(np.int64(2), {"load": [[1, 2], [3, 4]]})
    writer.write(3, {"a": jnp.float32(1.5), "b": jnp.array([0.25, 2.0], jnp.bfloat16)})
  assert metric_writer.read_jsonl(path) == [
    {"step": 1, "loss": 0.5, "max_vio": [1.0, 2.0], "tokens": 7},
    {"step": 2, "load": [[1, 2], [3, 4]]},
    {"step": 3, "a": 1.5, "b": [0.25, 2.0]},
  ]


def test_non_finite_values_are_valid_json_and_come_back(tmp_path):
  path = tmp_path / "m.jsonl"
  with metric_writer.JsonlWriter(path) as writer:
    writer.write(3, {"loss": math.nan, "x": np.array([[1.0, np.inf], [-np.inf, 2.0]])})

  def refuse(name):
    raise AssertionError(f"{name} is not JSON")

  assert json.loads(path.read_text(), parse_constant=refuse)["loss"] == "NaN"
  (line,) = metric_writer.read_jsonl(path)
  assert math.isnan(line["loss"]) and line["x"] == [[1.0, math.inf], [-math.inf, 2.0]]


def test_resume_removes_later_steps_and_continues(tmp_path):
  path = tmp_path / "m.jsonl"
  with metric_writer.JsonlWriter(path) as writer:
    for step in (10, 20, 20, 30, 40):
      writer.write(step, {"loss": float(step)})
  with metric_writer.JsonlWriter(path, resume_step=20) as writer:
    writer.write(30, {"loss": -1.0})
  assert [(x["step"], x["loss"]) for x in metric_writer.read_jsonl(path)] == [
    (10, 10),
    (20, 20),
    (20, 20),
    (30, -1),
  ]
  assert [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]


def test_torn_last_line_is_skipped_then_removed(tmp_path):
  path = tmp_path / "m.jsonl"
  path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
  assert metric_writer.read_jsonl(path) == [{"step": 1, "loss": 1.0}]
  with metric_writer.JsonlWriter(path) as writer:
    writer.write(2, {"loss": 2.0})
  assert [x["loss"] for x in metric_writer.read_jsonl(path)] == [1.0, 2.0]


def test_blank_lines_and_other_line_ends_are_no_damage(tmp_path, capsys):
  path = tmp_path / "m.jsonl"
  path.write_bytes(b'{"step": 1}\r\n\r\n \n{"step": 2}\r\n\n')
  assert [x["step"] for x in metric_writer.read_jsonl(path)] == [1, 2]
  with metric_writer.JsonlWriter(path, resume_step=2, expected=2) as writer:
    writer.write(3, {"loss": 1.0})
  assert [x["step"] for x in metric_writer.read_jsonl(path)] == [1, 2, 3] and capsys.readouterr().err == ""
  with path.open("a") as file:
    file.write("\nmine\n")
  with pytest.raises(InputError, match=r"line 5: not a JSON object"):
    metric_writer.read_jsonl(path)


@pytest.mark.parametrize(
  "line", ["{oops", "[1]", '{"loss": 1}', '"step"', f'{{"step": 1{"0" * 400}}}', '{"step": -1}']
)
def test_corrupt_line_is_named(tmp_path, line):
  path = tmp_path / "m.jsonl"
  path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
  with pytest.raises(InputError, match="line 2"):
    metric_writer.read_jsonl(path)
  before = path.read_bytes()
  metric_writer.JsonlWriter(path, resume_step=5).close()  # a run goes on with the lines that are whole
  assert [x["step"] for x in metric_writer.read_jsonl(path)] == [1, 2]
  assert (tmp_path / "damaged/m.jsonl-1").read_bytes() == before  # and nothing is lost


def test_wrong_metrics_are_refused(tmp_path):
  with metric_writer.JsonlWriter(tmp_path / "m.jsonl") as writer:
    with pytest.raises(TypeError, match="'loss'"):
      writer.write(1, {"loss": "high"})
    with pytest.raises(ValueError, match="step"):
      writer.write(1, {"step": 3})
  assert metric_writer.read_jsonl(tmp_path / "m.jsonl") == []


def test_tensorboard_reads_back(tmp_path):
  with metric_writer.TensorBoardWriter(tmp_path, resume_step=4) as writer:
    writer.write(
      5, {"loss": 0.5, "max_vio": np.array([1.0, 2.0]), "tokens": np.array([[1, 2, 3], [4, 4, 4]])}
    )
    writer.write(6, {"bad": math.nan, "tokens": np.array([[np.nan, 1.0]])})
  found, purged = _events(tmp_path)
  scalars = {tag: value for step, tag, value in found if step == 5 and not tag.startswith("tokens")}
  assert scalars == {"loss": 0.5, "max_vio/layer_0": 1.0, "max_vio/layer_1": 2.0}
  histograms = {tag: value for step, tag, value in found if tag.startswith("tokens")}
  assert sorted(histograms) == ["tokens/layer_0", "tokens/layer_1"]
  assert histograms["tokens/layer_0"].sum == 6 and histograms["tokens/layer_0"].num == 3
  assert [tag for step, tag, value in found if step == 6] == ["bad"]
  assert purged == [5]  # everything from step 5 on is to be forgotten


@pytest.mark.parametrize("clock", [0.0, -3600.0, -2e9], ids=["still", "set back", "before 1970"])
def test_a_run_that_goes_on_is_read_after_what_it_goes_on_from(tmp_path, monkeypatch, clock):
  """TensorBoard reads files in the order of their names; the clock may be set back, or another host's be behind."""
  now = time.time()
  for step, moved in ((1, 0.0), (2, clock), (3, clock)):
    monkeypatch.setattr(metric_writer.time, "time", lambda moved=moved: max(now + moved, 0.0))
    monkeypatch.setattr(metric_writer.socket, "gethostname", lambda step=step: f"host{9 - step}")
    with metric_writer.TensorBoardWriter(tmp_path, resume_step=step - 1) as writer:
      writer.write(step, {"loss": float(step)})
  found, purged = _events(tmp_path)
  assert purged == [1, 2, 3] and [step for step, _, _ in found] == [1, 2, 3]


def test_multi_writer_writes_and_closes_all(tmp_path):
  class Failing(metric_writer.MetricWriter):
    def write(self, step, metrics):
      pass

    def close(self):
      raise OSError("disk full")

  first, last = (metric_writer.JsonlWriter(tmp_path / name) for name in ("a.jsonl", "b.jsonl"))
  writer = metric_writer.MultiWriter([first, Failing(), last])
  writer.write(1, {"loss": 1.0})
  with pytest.raises(OSError, match="disk full"):
    writer.close()
  for name, each in (("a.jsonl", first), ("b.jsonl", last)):
    assert metric_writer.read_jsonl(tmp_path / name) == [{"step": 1, "loss": 1.0}]
    with pytest.raises(ValueError):
      each.write(2, {})
